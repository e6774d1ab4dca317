"""Low-rank terms: one that is mixed from several, head by head, and several as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from weft.expr.base import Expr, Promises
from weft.expr.nodes import LowRank


class Mixed(Expr):
    """A low-rank term whose factors are mixed from an inventory of k. value = scale B A

    B[i] = Σ_k p[h(i), k] b[k, i] and A[:, j] = Σ_k p[h(j), k] a[k, :, j], p[h] = σ(z[h]) / Σ_k σ(z[h, k]). Rows and columns are cut
    into as many heads as z has rows: of m rows, row i is in head ⌊i heads / m⌋.
    """

    b: Float[Tensor, "k m r"]
    a: Float[Tensor, "k r n"]
    z: Float[Tensor, "heads k"]
    scale: float = 1.0

    def pair(self) -> LowRank:
        """The same value as an ordinary low-rank term."""
        b, a = (t.detach() for t in self._factors())
        return LowRank(b, a, self.scale)

    def _factors(self) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        share = F.logsigmoid(self.z.to(wide)).softmax(-1)
        rows, columns = (share[self._heads(size)] for size in self.shape)
        b = torch.einsum("mk,kmr->mr", rows, self.b.to(wide))
        return b, torch.einsum("nk,krn->rn", columns, self.a.to(wide))

    def _heads(self, size: int) -> Int[Tensor, "size"]:
        """The head of every row or column."""
        return torch.arange(size, device=self.z.device) * len(self.z) // max(1, size)

    def dense(self) -> Float[Tensor, "m n"]:
        b, a = self._factors()
        return self.scale * (b @ a)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        b, a = self._factors()
        return self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        b, a = self._factors()
        return self.scale * (F.embedding(ids, b) @ a)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        return self.pair().take(rows)

    def promises(self) -> Promises:
        return Promises(rank=self.a.shape[1])

    def describe(self) -> str:
        heads = f", {len(self.z)} heads" if len(self.z) > 1 else ""
        return f"Mixed({self.a.shape[1]}, of {len(self.a)}{heads})"


def added_low_rank(parts: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Σ c s b a = [c₁ s₁ b₁ ... c_k s_k b_k] [a₁; ...; a_k], s the terms' scales."""
    b = torch.cat([c * t.scale * wide(t.b) for c, t in parts], 1)
    return LowRank(b, torch.cat([wide(t.a) for _, t in parts]))


def wide(t: Tensor) -> Tensor:
    """At least float32, out of any graph."""
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
