"""Matrices that are known by their name and a few bytes: permutations, Hadamard transforms."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Dense
from weft.grid import pack, packed_bytes, unpack


class Permutation(Expr):
    """Reorders: (P x)[i] = x[order[i]]. value[i, order[i]] = 1"""

    order: Int32[Tensor, "n"]

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["n"], dims["n"]

    def check(self) -> None:
        n = len(self.order)
        if self.order.device.type != "meta" and not torch.equal(self.order.sort()[0].cpu(), torch.arange(n).int()):
            got, want = f"{len(self.order.unique())} of {n} places", "every place once"
            raise ShapeError(
                "Permutation.order is none", where="Permutation.order", got=got, want=want, fix="use argsort"
            )

    def dense(self) -> Float[Tensor, "n n"]:
        return torch.eye(self.shape[0], device=self.order.device)[self.order.long()]

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return x.index_select(-1, self.order)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        at = self.order[rows].long().unsqueeze(1)
        return Dense(torch.zeros(len(at), self.shape[1], device=at.device).scatter(1, at, 1.0))

    def promises(self) -> Promises:
        return Promises(zeros=True, levels=2)

    def mask(self) -> Bool[Tensor, "n n"]:
        return self.dense().bool()

    def describe(self) -> str:
        return "permutation"


class Hadamard(Expr):
    """Hadamard blocks after sign flips. value = diag(H, H, ...) / √block · diag(signs), H of Sylvester's kind; orthogonal.

    Bit i of `signs` set: column i is negative. `block` is a power of two that divides n.
    """

    signs: UInt8[Tensor, "bytes"]
    n: int
    block: int

    @classmethod
    def of(cls, signs: Float[Tensor, "n"], block: int = 0) -> Hadamard:
        """From signs ±1; `block` 0: the largest power of two that divides n."""
        n = len(signs)
        return cls(pack((signs < 0).to(torch.uint8)[None], 1)[0], n, block or max(1, n & -n))

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.n, self.n

    def check(self) -> None:
        good = self.block >= 1 and self.block & (self.block - 1) == 0 and self.n % self.block == 0
        if not good or len(self.signs) != packed_bytes(self.n, 1):
            got = f"{len(self.signs)} bytes, n {self.n}, block {self.block}"
            want = "a bit a column, and blocks of a power of two that divides n"
            raise ShapeError(
                "Hadamard.signs does not fit", where="Hadamard.signs", got=got, want=want, fix="use Hadamard.of"
            )

    def flips(self) -> Float[Tensor, "n"]:
        """The signs, ±1."""
        return 1 - 2 * unpack(self.signs[None], 1, self.n)[0].float()

    def dense(self) -> Float[Tensor, "n n"]:
        return self(torch.eye(self.n, device=self.signs.device)).T

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return hadamard(x * self.flips().to(x.dtype), self.block)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        some = torch.eye(self.n, device=self.signs.device)[rows]
        return Dense(hadamard(some, self.block) * self.flips())  # H is symmetric: its rows are H of unit rows

    def describe(self) -> str:
        return f"Hadamard({self.block})"


def hadamard(x: Float[Tensor, "*b n"], block: int) -> Float[Tensor, "*b n"]:
    """The orthonormal Walsh-Hadamard transform of every `block` neighbours, in n log2(block) additions."""
    return cast(Tensor, _Hadamard.apply(x, block))


class _Hadamard(torch.autograd.Function):
    """The transform, which is its own adjoint: nothing is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.block = block
        y, half = x.unflatten(-1, (-1, block)), 1
        while half < block:
            pairs = y.unflatten(-1, (-1, 2, half))
            y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
            half *= 2
        return (y * block**-0.5).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return hadamard(grads[0], ctx.block), None
