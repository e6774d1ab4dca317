"""Entry by entry products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weft.error import ShapeError
from weft.expr.base import Expr, Promises


class Entrywise(Expr):
    """An entry by entry product of matrices of one shape. value[i, j] = parts[0][i, j] parts[1][i, j] ...

    What trains is made dense again in the backward, too.
    """

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

    def kids(self) -> Iterator[Expr]:
        yield from self.parts

    def dense(self) -> Float[Tensor, "m n"]:
        return _multiplied([part.dense() for part in self.kids()])

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        if self.frozen():
            return super().forward(x)
        return cast(Tensor, checkpoint(self._plain_product, x, use_reentrant=False, preserve_rng_state=False))

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        return _multiplied([part.rows(ids) for part in self.kids()])

    def promises(self) -> Promises:
        told = [part.promises() for part in self.kids()]
        ranks = [t.rank for t in told if t.rank is not None]
        return Promises(
            zeros=any(t.zeros for t in told),
            nm=next((t.nm for t in told if t.nm), None),
            rank=min(*self.shape, math.prod(ranks)) if len(ranks) == len(told) else None,
        )

    def mask(self) -> Bool[Tensor, "m n"] | None:
        masks = [mask for part in self.kids() if (mask := part.mask()) is not None]
        return torch.stack(masks).all(0) if masks else None

    def describe(self) -> str:
        return " ⊙ ".join(part.describe() for part in self.kids())


def _multiplied(values: Sequence[Tensor]) -> Tensor:
    first, *rest = values
    value = first.to(torch.promote_types(first.dtype, torch.float32))
    for other in rest:
        value = value * other
    return value
