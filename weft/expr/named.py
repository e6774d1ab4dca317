"""Factors of adapters: what stands beside a weight, under a name, and may be off."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises, tensors
from weft.expr.nodes import Dense


class Named(Expr):
    """A factor of the adapter `name`: nothing while it is off. value = kept, or the identity"""

    kept: Expr
    name: str
    on: bool = True

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.kept.shape

    def check(self) -> None:
        if self.shape[0] != self.shape[1]:
            want, fix = "as many rows as columns", "name a factor that may be left out"
            raise ShapeError("Named.kept does not fit", where="Named.kept", got=list(self.shape), want=want, fix=fix)

    def dense(self) -> Float[Tensor, "n n"]:
        return self.kept.dense() if self.on else self._nothing()

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return self.kept(x) if self.on else x

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        return self.kept.take(rows) if self.on else Dense(self._nothing()[rows])

    def _nothing(self) -> Float[Tensor, "n n"]:
        return torch.eye(self.shape[0], device=next(iter(tensors(self.kept).values())).device)

    def promises(self) -> Promises:
        return self.kept.promises() if self.on else Promises(zeros=True)

    def mask(self) -> Bool[Tensor, "n n"] | None:
        return self.kept.mask() if self.on else self._nothing().bool()

    def describe(self) -> str:
        return self.kept.describe() if self.on else f"{self.kept.describe()}, off"
