"""Bottleneck adapters: a small network on the output of a model's attention and feed-forward parts."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any, Literal, Self, cast, get_args

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as f

from weft.error import ConflictError, ShapeError
from weft.model.axes import family, parts
from weft.model.branch import Branch, Call
from weft.model.families import Attention

Form = Literal["parallel", "sequential"]
Position = Literal["ffn", "attention", "both"]
Act = Literal["relu", "gelu", "silu", "none"]
_RESIDUAL = "input_tensor"
"""What the modules behind which BERT adds and normalizes call the stream, which is also what their part has read."""


class Bottleneck(Branch):
    """Adds s f(x Dᵀ) Uᵀ to what its host gives: x is the host's output (sequential), or what the part reads (parallel).

    A host that adds the stream itself, before a norm, is given the stream with the addition.
    Of `splits` parts, feature k in part k mod splits, one takes part in a step of training, times `splits`: over the parts the mean
    of what it adds is what all of them add otherwise.
    """

    down: Float[Tensor, "k d"]
    up: Float[Tensor, "d k"]
    scale: float
    act: str
    form: str
    splits: int = 1
    _drawn: int | None = None

    def check(self, model: nn.Module) -> None:
        if self.form not in get_args(Form) or self.act not in get_args(Act):
            got, want = f"{self.form}, {self.act}", f"{', '.join(get_args(Form))}; {', '.join(get_args(Act))}"
            raise ConflictError("an adapter is of no kind", where=self.key, got=got, want=want, fix="use a newer weft")
        if not 1 <= self.splits <= len(self.down):
            want, fix = f"1 to {len(self.down)}, as many as features", "make it with fewer"
            raise ShapeError("an adapter has too many parts", where=self.key, got=self.splits, want=want, fix=fix)
        if self.at not in (places := bottleneck_hosts(model, cast(Form, self.form), "both")):
            fix = "make it for this model"
            raise ConflictError(
                "no adapter goes here", where=self.key, got=self.at, want=", ".join(places[:2]), fix=fix
            )
        if self.down.shape[1] != (d := width_of(model)):
            got = list(self.down.shape)
            raise ShapeError(
                "an adapter does not fit", where=self.key, got=got, want=f"[k {d}]", fix="make it for this"
            )

    def begin(self, step: int, seed: int) -> None:
        word = hashlib.blake2b(f"{seed}/{step}/{self.key}".encode(), digest_size=7).digest()
        self._drawn = int.from_bytes(word, "little") % self.splits

    def train(self, mode: bool = True) -> Self:
        if not mode:
            self._drawn = None
        return super().train(mode)

    def _part(self) -> slice:
        """The features that take part now. Errors: ConflictError in training whose steps are not told."""
        if not self.training or self.splits == 1:
            return slice(None)
        if self._drawn is None:
            what, fix = "this adapter trains by parts", "train with weft.train or weft.Trainer, or call weft.begin_step"
            raise ConflictError(what, where=self.key, got="no step of training", want="its number", fix=fix)
        return slice(self._drawn, None, self.splits)

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        if self.form == "sequential":
            return self._plus(call(given), None)
        if _RESIDUAL in given:
            return call({**given, _RESIDUAL: self._plus(given[_RESIDUAL], None)})
        read = cast(Tensor, next(iter(given.values())))  # the first argument
        return self._plus(call(given), read)

    def _plus(self, out: Any, read: Tensor | None) -> Any:
        """The output with the addition made from what is `read`, or from itself; of a tuple the first part."""
        first: Tensor = out[0] if isinstance(out, tuple) else out
        x = first if read is None else read
        part = self._part()
        scale = self.scale if part == slice(None) else self.scale * self.splits
        inner = f.linear(x, self.down[part].to(x.dtype))
        inner = inner if self.act == "none" else getattr(f, self.act)(inner)
        made = first + scale * f.linear(inner, self.up[:, part].to(x.dtype)).to(first.dtype)
        return (made, *cast("tuple[Any, ...]", out)[1:]) if isinstance(out, tuple) else made

    def describe(self) -> str:
        return f"Bottleneck({len(self.down)}, {self.form}{f', {self.splits} parts' if self.splits > 1 else ''})"


def bottleneck_hosts(model: nn.Module, form: Form, position: Position) -> list[str]:
    """The modules that adapters of this form go to, in the model's order.

    Errors: ConflictError for a family that no table describes, and for a model that lacks what the table says.
    """
    made, modules = list[str](), dict(model.named_modules())
    for block, part in parts(model):
        attention = isinstance(part, Attention)
        if position not in ("both", "attention" if attention else "ffn"):
            continue
        last = f"{block}.{part.o if attention else part.down}"
        whole = last.partition(".experts.")[0] if "*" in last else last.rpartition(".")[0]
        module = modules.get(whole)
        if module is None:
            fix = "describe the family in weft/model/families.py"
            raise ConflictError("a part is not there", where=whole, got="nothing", want="a module", fix=fix)
        adds = _RESIDUAL in inspect.signature(type(module).forward).parameters
        made.append(last if adds and form == "sequential" else whole)
    return made


def width_of(model: nn.Module) -> int:
    """The width of the stream. Errors: ConflictError for a family that no table describes."""
    family(model)
    return int(cast(Any, model).config.hidden_size)
