"""Matrices that are generated rather than stored: seeded bases, permutations, Hadamard transforms."""

from __future__ import annotations

import functools
import math
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor

from weft.error import OptionError, ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Dense
from weft.grid import pack, packed_bytes, unpack

_KINDS = ("random", "cosine", "fourier")
_WORK = 1 << 22
"""Generated entries at a time."""


class Basis(Expr):
    """Coefficients of a basis that is generated, never stored. value = Σ_k c[k] B_k; every B_k has variance 1.

    random: independent uniform entries, from a hash of seed, k and place. cosine: 2 cos(π (i + ½) p / m) cos(π (j + ½) q / n).
    fourier: √2 cos(2π (p i / m + q j / n)). The k frequencies (p, q) are those of smallest hash of seed and place, so they do
    not repeat. The same on every machine.
    """

    c: Float[Tensor, "k"]
    kind: str
    seed: int
    m: int
    n: int

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.m, self.n

    def check(self) -> None:
        if self.kind not in _KINDS:
            want = ", ".join(_KINDS)
            raise OptionError("unknown basis", where="Basis.kind", got=self.kind, want=want, fix="choose one of these")
        most = self.m * self.n if self.kind != "random" else 1 << 31
        if min(self.m, self.n) < 0 or self.m * self.n >= 1 << 40 or len(self.c) > most:
            got, want = f"{len(self.c)} coefficients of {self.m} x {self.n}", f"at most {most}"
            raise ShapeError("Basis.c does not fit", where="Basis.c", got=got, want=want, fix="use fewer")

    def dense(self) -> Float[Tensor, "m n"]:
        return self._rows(torch.arange(self.m, device=self.c.device))

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        return Dense(self._rows(torch.arange(self.m, device=self.c.device)[rows]))

    def _rows(self, rows: Int[Tensor, "r"]) -> Float[Tensor, "r n"]:
        c = self.c.to(torch.promote_types(self.c.dtype, torch.float32))
        if self.kind == "random":
            return cast(Tensor, _Random.apply(c, rows, self.seed, self.m, self.n))
        p, q = (f.double() for f in _frequencies(self.seed, self.m, self.n, len(c)))
        i, j = (at.double().unsqueeze(1) for at in (rows.cpu(), torch.arange(self.n)))  # not every device has float64
        if self.kind == "cosine":
            down, across = torch.cos(math.pi / self.m * (i + 0.5) * p), torch.cos(math.pi / self.n * (j + 0.5) * q)
            return 2 * (down.to(c) * c) @ across.to(c).T
        down, across = 2 * math.pi / self.m * (i * p % self.m), 2 * math.pi / self.n * (j * q % self.n)
        even, odd = (down.cos().to(c) * c) @ across.cos().to(c).T, (down.sin().to(c) * c) @ across.sin().to(c).T
        return 2**0.5 * (even - odd)

    def promises(self) -> Promises:
        per = {"random": min(self.m, self.n), "cosine": len(self.c), "fourier": 2 * len(self.c)}[self.kind]
        return Promises(rank=min(per, self.m, self.n))

    def describe(self) -> str:
        return f"{self.kind} basis({len(self.c)})"


class _Random(torch.autograd.Function):
    """Σ_k c[k] B_k of random matrices, generated a few at a time, again in the backward."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, rows: Tensor, seed: int, m: int, n: int) -> Tensor:
        ctx.of = (c, rows, seed, m, n)
        value = c.new_zeros(len(rows), n)
        for ks, b in _random(rows, seed, m, n, len(c)):
            value += torch.einsum("k,krn->rn", c[ks], b.to(c))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        c, rows, seed, m, n = ctx.of
        made = torch.empty_like(c)
        for ks, b in _random(rows, seed, m, n, len(c)):
            made[ks] = torch.einsum("rn,krn->k", grads[0].to(c), b.to(c))
        return made, None, None, None, None


def _random(rows: Tensor, seed: int, m: int, n: int, count: int) -> Any:
    """Slices of k with their B_k [k r n]: uniform, mean 0, variance 1."""
    place = rows.cpu().numpy().astype(np.uint64)[:, None] * np.uint64(n) + np.arange(n, dtype=np.uint64)
    step = max(1, _WORK // max(1, place.size))
    for first in range(0, count, step):
        ks = np.arange(first, min(first + step, count), dtype=np.uint64)
        word = _hash(seed, ks[:, None, None] * np.uint64(m * n) + place)
        unit = (word >> np.uint64(40)).astype(np.float32) * np.float32(2**-24) + np.float32(2**-25)
        yield slice(first, first + len(ks)), torch.from_numpy((unit - np.float32(0.5)) * np.float32(12**0.5))


@functools.lru_cache(64)
def _frequencies(seed: int, m: int, n: int, count: int) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
    """The places of an [m n] table whose hashes are smallest, in order of hash."""
    words = _hash(seed, np.arange(m * n, dtype=np.uint64))
    chosen = np.argpartition(words, count - 1)[:count] if 0 < count < len(words) else np.arange(len(words))[:count]
    at = torch.from_numpy(chosen[np.argsort(words[chosen], kind="stable")].astype(np.int64))
    return at // n, at % n


def _hash(seed: int, x: np.ndarray) -> np.ndarray:
    """64 well mixed bits of every number (the finalizer of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (x + np.uint64(seed & (2**64 - 1)) * np.uint64(0xD1342543DE82EF95) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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
    y, half = x.unflatten(-1, (-1, block)), 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        y = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)
