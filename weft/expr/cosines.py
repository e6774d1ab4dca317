"""A weight as a few waves of a cosine transform, at places of their own."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Dense
from weft.expr.spectra import cosine


class Cosines(Expr):
    """Waves of a cosine transform. value[i, j] = scale Σ_k 2 c[k] cos(π (i + ½) p[k] / m) cos(π (j + ½) q[k] / n)"""

    c: Float[Tensor, "k"]
    p: Int32[Tensor, "k"]
    q: Int32[Tensor, "k"]
    m: int
    n: int
    scale: float = 1.0

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.m, self.n

    def check(self) -> None:
        good = min(self.m, self.n) >= 0 and math.isfinite(self.scale)
        if good and self.c.device.type != "meta":
            good = not any(bool(((t < 0) | (t >= size)).any()) for t, size in ((self.p, self.m), (self.q, self.n)))
        if not good:
            want = f"from 0 to below {self.m} and {self.n}"
            fix = "keep frequencies within the matrix"
            raise ShapeError("Cosines.p or q does not fit", where="Cosines", got="others", want=want, fix=fix)

    def dense(self) -> Float[Tensor, "m n"]:
        if torch.compiler.is_compiling() or not self.m * self.n:
            return self._rows(slice(None))
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        return 2 * self.scale * cosine(c, self.p, self.q, self.m, self.n)

    def take(self, rows: slice | Int[Tensor, "r"]) -> Expr:
        return Dense(self._rows(rows))

    def _rows(self, rows: slice | Int[Tensor, "r"]) -> Float[Tensor, "r n"]:
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        down, across = waves(self.p, self.m)[rows].to(c.dtype), waves(self.q, self.n).to(c.dtype)
        return 2 * self.scale * (down * c) @ across.T

    def promises(self) -> Promises:
        return Promises(rank=min(len(self.c), self.m, self.n))

    def describe(self) -> str:
        return f"cosines({len(self.c)})"


def waves(frequencies: Int[Tensor, "k"], size: int) -> Float[Tensor, "size k"]:
    """cos(π (i + ½) f / size), in float64."""
    at = torch.arange(size, dtype=torch.float64, device=frequencies.device) + 0.5
    return torch.cos(math.pi / max(1, size) * at[:, None] * frequencies)
