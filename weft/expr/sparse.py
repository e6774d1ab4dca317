"""The sparse nodes, which hold their kept entries as an expression: any mask with even rows, and N of every M."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Dense
from weft.grid import pack, packed_bytes, unpack


class Masked(Expr):
    """Zeros where the mask says so; every row keeps the same number k of entries, held as an expression [m k].

    value[i, j] = kept[i, rank of j among row i's kept columns] where bit j of row i is set, else 0.
    """

    kept: Expr
    bits: UInt8[Tensor, "m bytes"]
    n: int

    @classmethod
    def of(cls, value: Float[Tensor, "m n"], mask: Bool[Tensor, "m n"]) -> Masked:
        """Keep `value` where `mask`; rows with fewer kept entries than others also keep some zeros."""
        count = mask.sum(1)
        if count.numel() and int(count.min()) != int(count.max()):
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]
            value, mask = value * mask, torch.zeros_like(mask).scatter_(1, order, True)
        kept = value[mask].view(mask.shape[0], -1)
        return cls(Dense(kept), pack(mask.to(torch.uint8), 1), mask.shape[1])

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.kept.shape[0], self.n

    def check(self) -> None:
        m, k = self.kept.shape
        good = self.bits.shape == (m, packed_bytes(self.n, 1))
        if not good or (self.bits.device.type != "meta" and not bool((self.mask().sum(1) == k).all())):
            raise ShapeError(
                "Masked.bits does not fit Masked.kept",
                where="Masked.bits",
                got=f"uint8{list(self.bits.shape)}",
                want=f"{k} bits set in each of {m} rows of {self.n} columns",
                fix="build it with Masked.of",
            )

    def mask(self) -> Bool[Tensor, "m n"]:
        return unpack(self.bits, 1, self.n).bool()

    def dense(self) -> Float[Tensor, "m n"]:
        return _scatter(self.kept, self.mask())

    def promises(self) -> Promises:
        return Promises(zeros=True, levels=_plus_zero(self.kept.promises().levels))

    def describe(self) -> str:
        return f"{1 - self.kept.shape[1] / max(1, self.n):.0%} zero({self.kept.describe()})"


class NM(Expr):
    """N of every M neighbours kept, as an expression [m, n N/M] and one pattern number for every M columns.

    Patterns are the combinations of N out of M in lexicographic order, packed in ceil(log2 C(M, N)) bits.
    """

    kept: Expr
    patterns: UInt8[Tensor, "m bytes"]
    keep: int
    of_every: int

    @classmethod
    def of(cls, value: Float[Tensor, "m n"], mask: Bool[Tensor, "m n"], keep: int, of_every: int) -> NM:
        """Keep `value` where `mask`, which must set exactly `keep` of every `of_every` columns."""
        table = _patterns(keep, of_every)
        weights = 2 ** torch.arange(of_every, device=mask.device)
        number = torch.full((2**of_every,), len(table), dtype=torch.long, device=mask.device)
        number[(table.to(mask.device) * weights).sum(1)] = torch.arange(len(table), device=mask.device)
        codes = number[(mask.view(mask.shape[0], -1, of_every) * weights).sum(-1)]  # [m n/M]
        if codes.numel() and int(codes.max()) >= len(table):
            raise ShapeError(
                "the mask is not N:M",
                where="NM.of",
                got="other counts",
                want=f"{keep} of every {of_every}",
                fix="choose the mask per M columns",
            )
        kept = value[mask].view(mask.shape[0], -1)
        return cls(Dense(kept), pack(codes.to(torch.uint8), _pattern_bits(keep, of_every)), keep, of_every)

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.kept.shape[0], self.kept.shape[1] * self.of_every // max(1, self.keep)

    def check(self) -> None:
        good = 0 < self.keep <= self.of_every <= 8 and self.kept.shape[1] % self.keep == 0
        blocks = self.kept.shape[1] // max(1, self.keep)
        want = packed_bytes(blocks, _pattern_bits(self.keep, self.of_every)) if good else 0
        if not good or self.patterns.shape != (self.kept.shape[0], want):
            raise ShapeError(
                "NM.patterns does not fit NM.kept",
                where="NM.patterns",
                got=f"uint8{list(self.patterns.shape)}, {self.keep}:{self.of_every}, kept {list(self.kept.shape)}",
                want=f"uint8[{self.kept.shape[0]}, {want}], 0 < N <= M <= 8, N divides the kept columns",
                fix="build it with NM.of",
            )
        if self.patterns.device.type != "meta":
            codes = unpack(self.patterns, _pattern_bits(self.keep, self.of_every), blocks)
            if codes.numel() and int(codes.max()) >= math.comb(self.of_every, self.keep):
                raise ShapeError(
                    "NM.patterns holds an unknown pattern",
                    where="NM.patterns",
                    got=int(codes.max()),
                    want=f"below {math.comb(self.of_every, self.keep)}",
                    fix="build it with NM.of",
                )

    def mask(self) -> Bool[Tensor, "m n"]:
        codes = unpack(self.patterns, _pattern_bits(self.keep, self.of_every), self.shape[1] // self.of_every)
        chosen = _patterns(self.keep, self.of_every).to(codes.device).index_select(0, codes.int().view(-1))
        return chosen.view(self.shape)

    def dense(self) -> Float[Tensor, "m n"]:
        return _scatter(self.kept, self.mask())

    def promises(self) -> Promises:
        return Promises(zeros=True, nm=(self.keep, self.of_every), levels=_plus_zero(self.kept.promises().levels))

    def describe(self) -> str:
        return f"{self.keep}:{self.of_every}({self.kept.describe()})"


def _scatter(kept: Expr, mask: Bool[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    value = kept.dense()
    return value.new_zeros(mask.shape).masked_scatter(mask, value)


def _plus_zero(levels: int | None) -> int | None:
    return None if levels is None else levels + 1


@functools.cache
def _patterns(keep: int, of_every: int) -> Bool[Tensor, "c m"]:
    chosen = torch.tensor(list(itertools.combinations(range(of_every), keep)))
    return torch.zeros(len(chosen), of_every, dtype=torch.bool).scatter_(1, chosen, True)


def _pattern_bits(keep: int, of_every: int) -> int:
    return max(1, (math.comb(of_every, keep) - 1).bit_length())
