"""Terms at a strength that may change while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import ConflictError, ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.mixed import Mixed, added_low_rank
from weft.expr.nodes import LowRank
from weft.expr.tree import Sum


class Gated(Expr):
    """An expression at a strength. value = g[0] kept

    g is not trained: `weft.activate` writes it, in all weights that hold the same one. For a while every row of a batch
    may have a strength of its own (`by_row`); there is no one value then.
    """

    written = ("g",)

    g: Float[Tensor, "one"]
    kept: Expr

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.kept.shape

    def check(self) -> None:
        if len(self.g) != 1:
            want, fix = "one number", "build it with one"
            raise ShapeError("Gated.g does not fit", where="Gated.g", got=len(self.g), want=want, fix=fix)

    def by_row(self, strengths: Float[Tensor, "rows"] | None) -> None:
        """From now on row i of a batch has strengths[i]; with None all have g again."""
        held: dict[str, Any] = self.__dict__
        held["_strengths"], self.is_matrix = strengths, self.kept.is_matrix and strengths is None

    def dense(self) -> Float[Tensor, "m n"]:
        if self._strengths is not None:
            got, fix = "a strength for every row of a batch", "leave weft.per_row first"
            raise ConflictError("a weight has no single value", where="Gated", got=got, want="a matrix", fix=fix)
        value = self.kept.dense()
        return value * self.g.to(torch.promote_types(value.dtype, torch.float32))

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        if self._off():
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        return self._times(self.kept, x, wide=False)

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        return self._times(self.kept.rows, ids, wide=True)

    def _times(self, run: Callable[[Tensor], Tensor], given: Tensor, *, wide: bool) -> Tensor:
        """What `run` makes of an input, times the strength, at least in float32 if `wide`; rows of a batch that have none are not run."""

        def times(y: Tensor, by: Tensor) -> Tensor:
            return y * by.to(torch.promote_types(y.dtype, torch.float32) if wide else y.dtype)

        each = self._strengths
        if each is None or len(each) != len(given) or given.dim() < 2 or torch.compiler.is_compiling():
            y = run(given)
            return times(y, self._strength(y.shape))
        on = each.nonzero().flatten().to(given.device)
        y = run(given[on])
        y = times(y, each.to(y.device)[on].view(-1, *[1] * (y.dim() - 1)))
        return y.new_zeros(len(each), *y.shape[1:]).index_copy(0, on, y)

    @property
    def _strengths(self) -> Tensor | None:
        return self.__dict__.get("_strengths")

    def _strength(self, shape: torch.Size) -> Tensor:
        """What an output of this shape is multiplied by."""
        each = self._strengths
        if each is None:
            return self.g
        if len(shape) < 2 or shape[0] != len(each):
            got, want = f"a result {list(shape)}", f"{len(each)} rows, as many as were named"
            fix = "give a batch of as many rows, without beams"
            raise ShapeError("which row an input is of cannot be told", where="per_row", got=got, want=want, fix=fix)
        return each.to(self.g.device).view(-1, *[1] * (len(shape) - 1))

    def _off(self) -> bool:
        """Whether there is nothing to compute; asked where that costs no wait for a device."""
        if torch.compiler.is_compiling() or self.g.device.type != "cpu" or self._strengths is not None:
            return False
        return float(self.g) == 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_strengths"} | {
            "is_matrix": self.kept.is_matrix
        }

    def promises(self) -> Promises:
        return self.kept.promises()

    def mask(self) -> Tensor | None:
        return self.kept.mask()

    def describe(self) -> str:
        strength = f"{float(self.g):g}" if self.g.device.type != "meta" else "g"
        return f"{strength} x ({self.kept.describe()})"


def settled(term: Expr) -> Expr:
    """The term as an ordinary low-rank one, where it is one: without its gate, factors mixed, those of a sum side by side."""
    if isinstance(term, Gated):
        held = settled(term.kept)
        return held.rebuild(scale=held.scale * float(term.g)) if isinstance(held, LowRank) else term
    if isinstance(term, Mixed):
        return term.pair()
    if isinstance(term, Sum):
        parts = [settled(t) for t in term.kids()]
        low = [(1.0, t) for t in parts if isinstance(t, LowRank)]
        return added_low_rank(low) if len(low) == len(parts) else term
    return term
