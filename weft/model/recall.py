"""Adapters that a context generates: what a frozen model's parts read of earlier segments of a text becomes low-rank updates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as f
from torch.utils.hooks import RemovableHandle

from weft.error import ConflictError, ShapeError
from weft.linalg.orthogonal import orthogonal
from weft.model.bottleneck import Position, bottleneck_hosts, width_of
from weft.model.branch import HELD, Branch, Call
from weft.model.virtual import table_of, trunk

_RESIDUAL = "input_tensor"
"""What parts that add the stream themselves call it."""


class Recall(Branch):
    """Cuts a text into segments, each of which the model reads alone, beside what the segments before it have generated.

    Of every part l, x its inputs in the frozen model: S_l = Σ (K_l x)(V_l x)ᵀ over the tokens of all earlier segments, of which only
    O(S_l), about U Wᵀ of S = U D Wᵀ, is used. The part gives s B_l O(S_l) A_l x more. `window`: tokens of a segment.
    `parts`: the paths of the parts from the host.
    """

    keys: Float[Tensor, "l r d"]
    values: Float[Tensor, "l r d"]
    down: Float[Tensor, "l r d"]
    up: Float[Tensor, "l d r"]
    scale: float
    window: int
    parts: str

    def check(self, model: nn.Module) -> None:
        table_of(model, self.key, self.at, "generated adapters")
        known = [p for position in ("attention", "ffn") for p in recall_hosts(model, position)]
        mine = [f"{self.at}.{p}" if self.at else p for p in self.parts.split()]
        fits = len(mine) == len(self.up) and set(mine) <= set(known) and self.up.shape[1] == width_of(model)
        if not fits or self.window < 1:
            got, want = self.describe(), f"parts such as {known[0]}, {width_of(model)} features, windows of tokens"
            raise ShapeError(
                "generated adapters do not fit", where=self.key, got=got, want=want, fix="make them for it"
            )

    def forward(self, host: nn.Module, call: Call, given: dict[str, Any]) -> Any:
        of = [b for b in cast(nn.ModuleList, host.get_submodule(HELD)) if isinstance(b, Recall) and b.on]
        if self is not of[-1]:
            return call(given)  # the outermost cuts the text, once for all
        self._may_run(host, given, of)
        first: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, length = first.shape[:2]
        count = -(-length // self.window)
        if count < 2:
            return call(given)
        cut, mask = self._cut(given, count, first)
        places = {(b, i): host.get_submodule(p) for b in of for i, p in enumerate(b.parts.split())}
        with torch.no_grad(), _seen(set(places.values())) as read:
            call({**cut, "use_cache": False})
        cores = {at: orthogonal(at[0]._earlier(at[1], read[m], mask, count), 1e-12) for at, m in places.items()}
        with _beside([(m, partial(at[0]._added, at[1], cores[at])) for at, m in places.items()]):
            out = call({**cut, "use_cache": False})
        out.last_hidden_state = out.last_hidden_state.unflatten(0, (rows, count)).flatten(1, 2)[:, :length]
        if getattr(out, "pooler_output", None) is not None:
            out.pooler_output = out.pooler_output[::count]
        return out

    def _cut(self, given: dict[str, Any], count: int, first: Tensor) -> tuple[dict[str, Any], Bool[Tensor, "c t"]]:
        """The arguments with every segment a row, and which of its tokens are no padding."""
        mask = given.get("attention_mask")
        mask = torch.ones(first.shape[:2], dtype=torch.long, device=first.device) if mask is None else mask
        spare = count * self.window - first.shape[1]
        made = {n: v for n, v in given.items() if n != "position_ids"}
        for name, value in {**made, "attention_mask": mask}.items():
            if isinstance(value, Tensor) and value.shape[:2] == first.shape[:2]:
                wide = f.pad(value, (*[0] * (2 * (value.dim() - 2)), 0, spare))
                made[name] = wide.unflatten(1, (count, self.window)).flatten(0, 1)
        there = cast(Tensor, made["attention_mask"]).bool()
        empty = ~there.any(1, keepdim=True)
        made["attention_mask"] = torch.where(empty, torch.ones_like(made["attention_mask"]), made["attention_mask"])
        return made, there

    def _earlier(
        self, i: int, x: Float[Tensor, "c t d"], mask: Bool[Tensor, "c t"], count: int
    ) -> Float[Tensor, "c r r"]:
        """S of each segment: what all earlier ones of its text add up to."""
        wide = torch.promote_types(x.dtype, torch.float32)
        there = x.to(wide).masked_fill(~mask[..., None], 0.0)
        x = f.rms_norm(there, x.shape[-1:], eps=torch.finfo(torch.float32).eps)
        k, v = f.linear(x, self.keys[i].to(wide)), f.linear(x, self.values[i].to(wide))
        sums = (k.mT @ v).unflatten(0, (-1, count)).cumsum(1)
        return f.pad(sums[:, :-1], (0, 0, 0, 0, 1, 0)).flatten(0, 1)

    def _added(self, i: int, core: Float[Tensor, "c r r"], x: Float[Tensor, "c t d"]) -> Float[Tensor, "c t d"]:
        """What part i gives more."""
        inner = f.linear(x, self.down[i].to(x.dtype)) @ core.mT.to(x.dtype)
        return self.scale * f.linear(inner, self.up[i].to(x.dtype))

    def _may_run(self, host: nn.Module, given: dict[str, Any], of: Sequence[Recall]) -> None:
        """Errors: ConflictError for caches, packed texts, other masks, states and attentions, blocks that are computed again, and for
        others with another window.
        """
        if len(windows := {b.window for b in of}) > 1:
            self._refuse("a text is cut in one way", f"windows of {sorted(windows)}", "one window")
        if given.get("past_key_values") is not None:
            self._refuse("segments are read without a cache", "past_key_values", "use_cache=False")
        positions = given.get("position_ids")
        if positions is not None and bool((positions != torch.arange(positions.shape[-1]).to(positions)).any()):
            self._refuse("segments have positions of their own", "other positions than 0, 1, ...", "one text a row")
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            self._refuse("segments do not go with this mask", "no row of numbers a text", "a mask of tokens")
        if mask is not None and bool((mask.diff(dim=1) > 0).any()):
            self._refuse("segments begin with the text", "padding before it", "padding behind it")
        config = cast(Any, host).config
        for name in ("output_hidden_states", "output_attentions"):
            if given.get(name) if given.get(name) is not None else getattr(config, name, False):
                self._refuse("segments give the last state alone", name, f"{name}=False")
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in host.modules()):
            self._refuse("segments are not computed again", "gradient checkpointing", "training without it")

    def _refuse(self, what: str, got: str, want: str) -> NoReturn:
        fix = "call the model so, or take the branch off with weft.unbranch(model)"
        raise ConflictError(what, where=self.key, got=got, want=want, fix=fix)

    def describe(self) -> str:
        return f"Recall({self.up.shape[2]}, {len(self.up)} parts, window {self.window})"


def recall_hosts(model: nn.Module, position: Position) -> list[str]:
    """The parts that generated adapters go to. Errors: ConflictError for parts that add the stream themselves; `bottleneck_hosts`."""
    made = bottleneck_hosts(model, "parallel", position)
    within = f"{trunk(model)}." if trunk(model) else ""
    for path in made:
        adds = _RESIDUAL in inspect.signature(type(model.get_submodule(path)).forward).parameters
        if adds or not path.startswith(within):
            got, want = (
                "a part that adds the stream itself" if adds else "a part outside the transformer",
                "parts of a sum",
            )
            fix = "choose another adapter, such as bottleneck"
            raise ConflictError("this model takes no generated adapters", where=path, got=got, want=want, fix=fix)
    return made


@contextmanager
def _seen(hosts: Collection[nn.Module]) -> Generator[dict[nn.Module, Tensor]]:
    """What these modules read, once they were called."""
    read = dict[nn.Module, Tensor]()

    def see(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        read[module] = _first(args, given)

    with _hooked([m.register_forward_pre_hook(see, with_kwargs=True) for m in hosts]):
        yield read


@contextmanager
def _beside(added: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Generator[None]:
    """Within, each module gives more: what its functions make of what it reads."""

    def plus(more: Any, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> Any:
        extra = more(_first(args, given))
        return (out[0] + extra, *out[1:]) if isinstance(out, tuple) else out + extra

    with _hooked([m.register_forward_hook(partial(plus, more), with_kwargs=True) for m, more in added]):
        yield


@contextmanager
def _hooked(hooks: Sequence[RemovableHandle]) -> Generator[None]:
    """Takes the hooks off in the end."""
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def _first(args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
    """The first argument."""
    return args[0] if args else next(iter(given.values()))
