"""The leaves: dense, quantized, low-rank, diagonal; and the sparse ones, which hold their kept entries as an expression."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import CHUNK, Expr, Promises
from weft.grid import grid, pack, packed_bytes, unpack


class Dense(Expr):
    """A matrix as it is. value = w"""

    w: Float[Tensor, "m n"]

    def dense(self) -> Float[Tensor, "m n"]:
        return self.w

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        if self.w.requires_grad or self.w.dtype == x.dtype or self.w.numel() <= CHUNK // 16:
            return F.linear(x, self.w.to(x.dtype))
        return super().forward(x)

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        return F.embedding(ids, self.w)

    def describe(self) -> str:
        return str(self.w.dtype).removeprefix("torch.")


class LowRank(Expr):
    """A product of two thin factors. value = b a"""

    b: Float[Tensor, "m r"]
    a: Float[Tensor, "r n"]

    def dense(self) -> Float[Tensor, "m n"]:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self.b.to(wide) @ self.a.to(wide)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return F.embedding(ids, self.b).to(wide) @ self.a.to(wide)

    def promises(self) -> Promises:
        return Promises(rank=self.a.shape[0])

    def describe(self) -> str:
        return f"LowRank({self.a.shape[0]})"


class Diagonal(Expr):
    """A diagonal matrix. value = diag(d)"""

    d: Float[Tensor, "n"]

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["n"], dims["n"]

    def dense(self) -> Float[Tensor, "n n"]:
        return torch.diag(self.d.to(torch.promote_types(self.d.dtype, torch.float32)))

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return x * self.d.to(x.dtype)

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        ids = torch.arange(self.shape[0], device=self.d.device)[rows]
        out = self.d.new_zeros(len(ids), self.shape[1])
        return Dense(out.index_put((torch.arange(len(ids), device=self.d.device), ids), self.d[ids]))

    def promises(self) -> Promises:
        return Promises(zeros=True)

    def mask(self) -> Bool[Tensor, "n n"]:
        return torch.eye(self.shape[0], dtype=torch.bool, device=self.d.device)

    def describe(self) -> str:
        return "diagonal"


class Quantized(Expr):
    """Codes on a grid with a scale, and a zero point if asymmetric, for every `group` columns of a row.

    value = (code - zero) * scale on integer grids, levels[code] * scale on table grids; zero = 2^(bits-1) if symmetric.
    A row of `data` is: packed codes | scales (bfloat16) | packed zero points. `group` 0 means one group a row.
    Bytes, not floats, so no dtype cast can damage it.
    """

    data: UInt8[Tensor, "m bytes"]
    n: int
    grid: str
    group: int
    symmetric: bool

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return dims["m"], self.n

    @classmethod
    def encode(
        cls,
        codes: UInt8[Tensor, "m n"],
        scales: Float[Tensor, "m g"],
        zeros: UInt8[Tensor, "m g"] | None,
        *,
        grid: str,
        group: int,
    ) -> Quantized:
        """Pack codes, scales (rounded to bfloat16) and zero points (None: symmetric)."""
        parts = [pack(codes, _bits(grid)), scales.to(torch.bfloat16).contiguous().view(torch.uint8)]
        if zeros is not None:
            parts.append(pack(zeros, _bits(grid)))
        return cls(torch.cat(parts, 1), codes.shape[1], grid, group, zeros is None)

    def check(self) -> None:
        size = self.group or self.n
        spec = grid(self.grid)
        want = (
            packed_bytes(self.n, spec.bits)
            + 2 * self.groups
            + (0 if self.symmetric else packed_bytes(self.groups, spec.bits))
        )
        if size < 1 or self.data.shape[1] != want or (spec.levels and not self.symmetric):
            raise ShapeError(
                "Quantized.data does not fit",
                where="Quantized.data",
                got=f"{self.data.shape[1]} bytes a row",
                want=f"{want} bytes for {self.n} columns, {self.grid}, group {self.group}; table grids are symmetric",
                fix="build it with Quantized.encode",
            )

    @property
    def groups(self) -> int:
        """Groups in a row; the last one may be shorter."""
        return math.ceil(self.n / (self.group or self.n or 1))

    def codes(self) -> UInt8[Tensor, "m n"]:
        """The codes, unpacked."""
        return unpack(self.data[:, : packed_bytes(self.n, _bits(self.grid))], _bits(self.grid), self.n)

    def scales(self) -> Float[Tensor, "m g"]:
        """The scales as float32."""
        at = packed_bytes(self.n, _bits(self.grid))
        return (
            self.data[:, at : at + 2 * self.groups]
            .clone(memory_format=torch.contiguous_format)
            .view(torch.bfloat16)
            .float()
        )

    def zeros(self) -> Float[Tensor, "m g"] | float:
        """The zero points as float32; one number where symmetric."""
        bits = _bits(self.grid)
        if self.symmetric:
            return float(2 ** (bits - 1))
        return unpack(self.data[:, packed_bytes(self.n, bits) + 2 * self.groups :], bits, self.groups).float()

    def dense(self) -> Float[Tensor, "m n"]:
        levels, codes, zeros = grid(self.grid).levels, self.codes(), self.zeros()
        if levels is not None:
            value = torch.tensor(levels, device=codes.device)[codes.int()]
        elif isinstance(zeros, Tensor):
            value = codes.float().sub_(self.spread(zeros))
        else:
            value = codes.float().sub_(zeros)
        return value.mul_(self.spread(self.scales()))

    def spread(self, per_group: Float[Tensor, "m g"]) -> Float[Tensor, "m n"]:
        """One value a group, repeated over the group's columns."""
        return spread(per_group, self.group, self.n)

    def promises(self) -> Promises:
        return Promises(levels=2 ** _bits(self.grid))

    def describe(self) -> str:
        where = f"g{self.group}" if self.group else "channel"
        return f"{self.grid}[{where}{'' if self.symmetric else ', asymmetric'}]"


def spread(per_group: Float[Tensor, "m g"], group: int, n: int) -> Float[Tensor, "m n"]:
    """Repeat one value a group over its `group` columns (0: all), cut at `n`."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, n)
    return per_group.repeat_interleave(group, 1)[:, :n]


def _bits(name: str) -> int:
    return grid(name).bits


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
        return _patterns(self.keep, self.of_every).to(codes.device)[codes.int()].flatten(1)

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
