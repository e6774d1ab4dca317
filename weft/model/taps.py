"""Tap: what happens to an activation before the weights that read it: online rotations, then a rounding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from weft.error import ConflictError, FormatError, ShapeError, WeftError, raise_all
from weft.expr import (
    CHUNK,
    Diagonal,
    Expr,
    Hadamard,
    Product,
    between,
    build,
    hadamard,
    spec,
    tensors,
    terms_of,
    total,
)  # fmt: skip
from weft.model.rounding import Rounding


class Tap(nn.Module):
    """A transform on an activation edge, shared by every reader of the edge. tap(x) = round(... turn[1] turn[0] x)

    Turns are Hadamard rotations, exact in value and gradient; their readers' weights are W turn[0]ᵀ turn[1]ᵀ ... The
    rounding comes last. Never changed in place: another tap is another object.
    """

    def __init__(self, turn: Sequence[Expr] = (), round: Rounding | None = None) -> None:  # the word of the field
        super().__init__()
        bad = [t for t in turn if not isinstance(t, Hadamard)]
        if bad or len({t.shape for t in turn}) > 1:
            got = ", ".join(f"{type(t).__name__} {list(t.shape)}" for t in turn)
            want, fix = "Hadamard turns of one size", "build it of these"
            raise ShapeError("this makes no tap", where="Tap", got=got, want=want, fix=fix)
        self.turn, self.round = nn.ModuleList(turn), round

    def turns(self) -> tuple[Hadamard, ...]:
        """The rotations, first one first."""
        return tuple(cast(Hadamard, t) for t in self.turn)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return self.seen(x).value

    def seen(self, x: Float[Tensor, "*b n"]) -> Seen:
        """What the tap makes of x: made once for all readers as long as x lives and is not written to."""
        if x.is_inference() or torch.compiler.is_compiling():
            return Seen(self, x, {})
        last = _LAST.get(self)
        if last is None or last[0]() is not x or last[1] != x._version:
            tap: weakref.ref[Tap] = weakref.ref(self)
            last = (weakref.ref(x, lambda gone: _forget(tap, gone)), x._version, {})
            _LAST[self] = last
        return Seen(self, x, last[2])

    def turned(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """x, or the rows of a matrix, in the coordinates behind the turns."""
        for t in self.turns():
            x = t(x)
        return x

    def back(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        """The inverse of `turned`."""
        for t in reversed(self.turns()):
            x = unturn(x, t)
        return x

    def describe(self) -> str:
        """Such as `Hadamard(32), int8[token]`."""
        return ", ".join([t.describe() for t in self.turns()] + ([self.round.describe()] if self.round else []))

    def extra_repr(self) -> str:
        return self.describe()


class Seen:
    """What a tap makes of one tensor; each part is computed when it is asked for, and kept in `kept` without a graph."""

    def __init__(self, tap: Tap, x: Float[Tensor, "*b n"], kept: dict[str, Any]) -> None:
        self.tap, self.x, self.kept = tap, x, kept

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.kept:
            with torch.no_grad():
                self.kept[name] = make()
        return self.kept[name]

    def _turned(self) -> Float[Tensor, "*b n"]:
        """The input behind the turns, in float32 at least."""
        x = self.x.detach()
        if not len(self.tap.turn):
            return x
        return self._once("turned", lambda: self.tap.turned(x.to(torch.promote_types(x.dtype, torch.float32))))

    @property
    def codes(self) -> tuple[Int8[Tensor, "t n"], Float[Tensor, "#t 1"]] | None:
        """The rounded tokens as whole numbers and scales, where they are such."""
        rounding = self.tap.round
        if rounding is None or not rounding.integers or not self.x.numel():
            return None
        return self._once("codes", lambda: rounding.codes(self._turned()))

    @property
    def value(self) -> Float[Tensor, "*b n"]:
        """The tapped input, in the input's dtype."""
        if not self.x.numel() or not (len(self.tap.turn) or self.tap.round):
            return self.x
        made = self._once("value", lambda: self._value().to(self.x.dtype))
        if torch.is_grad_enabled() and self.x.requires_grad:
            return cast(Tensor, _Through.apply(self.x, made, self.tap))
        return made

    def _value(self) -> Float[Tensor, "*b n"]:
        rounding, turned = self.tap.round, self._turned()
        if rounding is None:
            return turned
        if self.codes is None:
            return rounding(turned)
        codes, scales = self.codes
        return (codes.float() * scales).view(turned.shape)


class _Through(torch.autograd.Function):
    """A tapped value. Its gradient goes straight through the rounding, and back through the turns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor, tap: Tap) -> Tensor:
        ctx.tap = tap
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.tap.back(grads[0]), None, None


_Last = tuple[weakref.ref[Tensor], int, dict[str, Any]]
_LAST: weakref.WeakKeyDictionary[Tap, _Last] = weakref.WeakKeyDictionary()
"""What each tap made of the tensor that it saw last. That is held weakly, and what was made of it goes when it does."""


def _forget(tap: weakref.ref[Tap], gone: Any) -> None:
    owner = tap()
    if owner is not None and (last := _LAST.get(owner)) is not None and last[0] is gone:
        del _LAST[owner]


def unturn(x: Float[Tensor, "*b n"], by: Hadamard) -> Float[Tensor, "*b n"]:
    """x Hᵀ⁻¹ row by row: what `by` made of x, back again."""
    return hadamard(x, by.block) * by.flips().to(x.dtype)


def tap_tensors(tap: Tap) -> dict[str, Tensor]:
    """Every stored tensor of a tap by its path; of no rounding but a static one."""
    made = {f"turn.{i}.{k}": t for i, h in enumerate(tap.turns()) for k, t in tensors(h).items()}
    return made | ({"round.data": tap.round.data} if tap.round is not None and len(tap.round.data) else {})


def tap_spec(tap: Tap) -> dict[str, Any]:
    """A tap without its tensors, as JSON."""
    made: dict[str, Any] = {"turn": [spec(t) for t in tap.turns()]}
    if (r := tap.round) is not None:
        made["round"] = {"grid": r.grid, "per": r.per, "group": r.group, "scale": r.scale}
    return made


def build_tap(tree: Mapping[str, Any], get: Callable[[str], Tensor]) -> Tap:
    """The tap of a spec; `get(path)` gives each tensor. Errors: FormatError for unknown keys; those of the parts."""
    turn, how = tree["turn"], tree.get("round")
    fields = {"grid", "per", "group", "scale"}
    if set(tree) - {"turn", "round"} or not isinstance(turn, list) or ("round" in tree and set(how or ()) != fields):
        got, want = sorted(tree), f"turn, a list, and round with {', '.join(sorted(fields))}"
        raise FormatError("a tap has other fields", where="tap", got=got, want=want, fix="use the weft that wrote it")
    turns = [build(t, get, f"turn.{i}.") for i, t in enumerate(turn)]
    data = get("round.data") if how and how["per"] == "static" else None
    return Tap(turns, Rounding(**how, data=data) if how else None)


def moved(expr: Expr, by: Hadamard) -> Expr:
    """The expression behind one more turn of its input: value Hᵀ, term by term.

    Dense and low-rank terms are computed, in their own dtype and as trainable as they were. Any other keeps its codes and
    takes Hᵀ as right sides.
    """
    plain = Hadamard.of(torch.ones(by.n, device=by.signs.device), by.block)
    return _mapped(expr, by, (Diagonal(by.flips()), plain))


def unmoved(expr: Expr, tap: Tap) -> Expr:
    """The expression before the tap's turns: value turn[-1] ... turn[0]."""
    return _mapped(expr, tap.back, tuple(reversed(tap.turns()))) if tap.turns() else expr


def folded(expr: Expr, tap: Tap) -> Expr:
    """The same value as a product; nothing is computed."""
    return Product(expr, *reversed(tap.turns())) if tap.turns() else expr


def _mapped(expr: Expr, rows: Callable[[Tensor], Tensor], sides: tuple[Expr, ...]) -> Expr:
    """The expression after a map of its inputs: of each row of values, or as right sides."""

    def values(t: Tensor) -> Tensor:
        wide, step = torch.promote_types(t.dtype, torch.float32), max(1, CHUNK // max(1, t.shape[1]))
        return torch.cat([rows(part.to(wide)).to(t.dtype) for part in t.split(step)])

    return total(terms_of(expr.mapped(1, values, lambda e: between((), e, sides))))


def refuse_roundings(taps: Mapping[str, Tap], where: str) -> None:
    """Errors: ConflictError naming every site whose input is rounded, since no plain weight does that."""
    problems: list[WeftError] = [
        ConflictError(
            f"{where} cannot hold what rounds activations",
            where=name,
            got=tap.describe(),
            want="plain inputs",
            fix="save it with weft.save, or take the taps off with weft.untap(model)",
        )
        for name, tap in taps.items()
        if tap.round is not None
    ]
    raise_all(problems)
