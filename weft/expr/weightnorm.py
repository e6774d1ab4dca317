"""Magnitude and direction of a weight's rows, apart."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr.base import Expr, Promises


class WeightNorm(Expr):
    """Rows of given lengths, those of v while it is off. value[i] = g[i] v[i] / ||v[i]||

    It belongs to the last adapter in v. The lengths of v's rows are constants in the backward, so that nothing dense is kept for it
    (as DoRA has it, arXiv 2402.09353, section 4.3). Rows of zeros stay zero.
    """

    g: Float[Tensor, "m"]
    v: Expr
    on: bool = True

    @classmethod
    def of(cls, v: Expr) -> WeightNorm:
        """The expression itself, as a direction and a magnitude."""
        return cls(_lengths(v), v)

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.v.shape

    def dense(self) -> Float[Tensor, "m n"]:
        return self.v.dense() * self._factor()[:, None] if self.on else self.v.dense()

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        y = self.v(x)
        return y if not self.on else (y * self._factor()).to(y.dtype)

    def _factor(self) -> Float[Tensor, "m"]:
        lengths = _lengths(self.v)
        return self.g.to(torch.promote_types(self.g.dtype, lengths.dtype)) / torch.where(lengths > 0, lengths, 1)

    def promises(self) -> Promises:
        return replace(self.v.promises(), levels=None) if self.on else self.v.promises()

    def mask(self) -> Tensor | None:
        return self.v.mask()

    def describe(self) -> str:
        return f"norm({self.v.describe()})" if self.on else self.v.describe()


def _lengths(v: Expr) -> Float[Tensor, "m"]:
    """The length of every row, in slices."""
    with torch.no_grad():
        values = (part.dense() for part in v.slices())
        return torch.cat([w.to(torch.promote_types(w.dtype, torch.float32)).norm(dim=1) for w in values])
