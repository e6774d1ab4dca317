"""Entry by entry products."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises


class Entrywise(Expr):
    """An entry by entry product of matrices of one shape. value[i, j] = parts[0][i, j] parts[1][i, j] ..."""

    parts: Sequence[Expr]

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return next(self.kids()).shape

    def check(self) -> None:
        if len({part.shape for part in self.kids()}) != 1:
            raise ShapeError(
                "these parts have no product entry by entry",
                where="Entrywise.parts",
                got=", ".join(str(list(part.shape)) for part in self.kids()),
                want="one shape",
                fix="reshape the parts",
            )

    def dense(self) -> Float[Tensor, "m n"]:
        return _times(part.dense() for part in self.kids())

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        return _times(part.rows(ids) for part in self.kids())

    def promises(self) -> Promises:
        told = [part.promises() for part in self.kids()]
        ranks = [t.rank for t in told]
        rank = None if None in ranks else min(*self.shape, functools.reduce(lambda a, b: a * b, (r or 0 for r in ranks)))
        return Promises(zeros=any(t.zeros for t in told), nm=next((t.nm for t in told if t.nm), None), rank=rank)
