"""Rotations in blocks, of free numbers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.derived import Derived
from weft.expr.nodes import Dense


class Cayley(Expr):
    """Rotations of blocks of neighbours. value = diag(R_1, R_2, ...), R = (I + Q)(I - Q)⁻¹, Q skew; orthogonal.

    A row of q has what is above the diagonal of a block's Q, row by row. Rotations of a frozen q are kept.
    """

    q: Float[Tensor, "k p"]
    block: int

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["k"] * self.block, dims["k"] * self.block

    def check(self) -> None:
        want = self.block * (self.block - 1) // 2
        if self.block < 1 or self.q.shape[1] != want:
            got, want = f"{self.q.shape[1]} numbers for blocks of {self.block}", f"{want} a block"
            raise ShapeError("Cayley.q does not fit", where="Cayley.q", got=got, want=want, fix="check the block")

    def turns(self) -> Float[Tensor, "k b b"]:
        """The rotations."""
        if not self.frozen() or torch.compiler.is_compiling():
            return self._turns()
        return self.derive("turns", lambda: Derived((self,), (self._turns(),))).value[0]

    def _turns(self) -> Float[Tensor, "k b b"]:
        q = self.q.to(torch.promote_types(self.q.dtype, torch.float32))
        i, j = torch.triu_indices(self.block, self.block, 1, device=q.device)
        upper = q.new_zeros(len(q), self.block**2).index_copy(1, i * self.block + j, q).unflatten(1, (self.block, -1))
        skew, unit = upper - upper.mT, torch.eye(self.block, dtype=q.dtype, device=q.device)
        return torch.linalg.solve(unit - skew, unit + skew)  # the two commute

    def dense(self) -> Float[Tensor, "n n"]:
        return torch.block_diag(*self.turns())

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        parts = x.unflatten(-1, (len(self.q), self.block))
        return torch.einsum("...kj,kij->...ki", parts, self.turns().to(x.dtype)).flatten(-2)

    def turned(self, value: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """A matrix times this one, in float32 at least."""
        turns = self.turns()
        wide = torch.promote_types(turns.dtype, value.dtype)
        return torch.einsum("mkj,kji->mki", value.to(wide).unflatten(1, turns.shape[:2]), turns.to(wide)).flatten(1)

    def take(self, rows: slice | Int[Tensor, "r"]) -> Expr:
        return Dense(self.dense()[rows])

    def promises(self) -> Promises:
        return Promises(zeros=True)

    def mask(self) -> Bool[Tensor, "n n"]:
        block = torch.arange(self.shape[0], device=self.q.device) // self.block
        return block[:, None] == block

    def describe(self) -> str:
        return f"rotations of {self.block}"
