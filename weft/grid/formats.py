"""The grids: integers of 2 to 8 bits, sign and ternary, floats of 4, 6 and 8 bits (OCP MX 1.0, 5.3), NF4 (2305.14314, appendix E)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from weft.error import OptionError, ShapeError
from weft.grid.bits import digits, pack, packed_bytes, unpack


@dataclass(frozen=True)
class Grid:
    """The values that a code can mean, before its group's scale.

    Integer grids have `levels is None`: code q means q - zero, with zero = 2^(bits-1) when symmetric. Table grids list the
    value of every code, have no zero point, and a NaN where a code means no number. `even`: of two levels that are equally
    near, rounding takes the even code, as IEEE 754 does. `per_byte`: so many codes make a byte, digits of one number.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None = None
    even: bool = False
    per_byte: int = 0

    @property
    def count(self) -> int:
        """How many codes there are."""
        return 2**self.bits if self.levels is None else len(self.levels)

    @functools.cached_property
    def ascending(self) -> tuple[Float[Tensor, "c"], UInt8[Tensor, "c"]]:
        """The distinct levels of a table grid in ascending order, and their codes; zero is the code of plus zero."""
        held = {v: code for code, v in reversed(list(enumerate(self.levels or ()))) if math.isfinite(v)}
        order = sorted(held)
        return torch.tensor(order), torch.tensor([held[v] for v in order], dtype=torch.uint8)

    @functools.cached_property
    def top(self) -> float:
        """The largest level of a table grid."""
        return float(self.ascending[0][-1])

    @functools.cached_property
    def steps(self) -> tuple[float, float, tuple[int, ...]] | None:
        """Evenly spaced levels, before a zero point, as least + step k: the step, the least, and every code's whole k below 256.

        None where the levels are not evenly spaced.
        """
        if self.levels is None:
            return 1.0, 0.0, tuple(range(self.count))
        order = self.ascending[0].double()
        step, least = float(order.diff().min()), float(order[0])
        numbers = [(v - least) / step for v in self.levels]
        good = all(k == k // 1 and k < 256 for k in numbers)
        return (step, least, tuple(int(k) for k in numbers)) if good else None

    def row_bytes(self, n: int) -> int:
        """Bytes that `n` codes take."""
        return -(-n // self.per_byte) if self.per_byte else packed_bytes(n, self.bits)

    def pack(self, codes: UInt8[Tensor, "m n"]) -> UInt8[Tensor, "m bytes"]:
        """Codes as bytes, row by row. Errors: ShapeError if a code does not fit."""
        if not self.per_byte:
            return pack(codes, self.bits)
        if codes.numel() and int(codes.max()) >= self.count:
            got, want = int(codes.max()), f"below {self.count}"
            raise ShapeError("a code does not fit its grid", where=self.name, got=got, want=want, fix="clamp the codes")
        digits = torch.nn.functional.pad(codes, (0, -codes.shape[1] % self.per_byte))
        return (digits.view(len(codes), -1, self.per_byte) * self._weights(codes)).sum(-1, dtype=torch.uint8)

    def unpack(self, data: UInt8[Tensor, "m bytes"], n: int) -> UInt8[Tensor, "m n"]:
        """Inverse of `pack` for rows of `n` codes."""
        if not self.per_byte:
            return unpack(data, self.bits, n)
        return digits(data, self.count, self.per_byte, n)

    def _weights(self, like: Tensor) -> UInt8[Tensor, "k"]:
        return torch.tensor([self.count**i for i in range(self.per_byte)], dtype=torch.uint8, device=like.device)

    def value(self, codes: Tensor) -> Float[Tensor, "..."]:
        """What the codes of a table grid mean."""
        levels = torch.tensor(self.levels, device=codes.device)
        return levels.index_select(0, codes.int().view(-1)).view(codes.shape)

    def decode(self, data: UInt8[Tensor, "m bytes"], n: int) -> Float[Tensor, "m n"]:
        """What packed codes of a table grid mean; of four bits, both values of a byte in one look-up."""
        if self.bits != 4 or torch.compiler.is_compiling():  # a compiler cannot make the table of pairs
            return self.value(self.unpack(data, n))
        made = self._pairs.to(data.device).index_select(0, data.int().view(-1)).view(torch.float32)
        return made.view(len(data), 2 * data.shape[1])[:, :n].contiguous()

    @functools.cached_property
    def _pairs(self) -> Tensor:
        """For every byte the values of its two codes, as one word."""
        levels = torch.tensor(self.levels)
        return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1).view(torch.int64).view(-1)

    def nearest(self, x: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
        """The code of a table grid's nearest level; beyond the ends, that of the end."""
        levels, codes = (t.to(x.device) for t in self.ascending)
        middles = (levels[1:] + levels[:-1]) / 2
        at = torch.bucketize(x.contiguous(), middles)  # a tie is the lower level's
        if self.even:
            tie = x == middles[at.clamp(max=len(middles) - 1)]
            at = at + (tie & (codes[at] % 2 == 1))
        return codes[at]


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _floats(exponent: int, mantissa: int, special: str = "") -> tuple[float, ...]:
    """The values of a small float: sign, exponent (bias 2^(exponent-1) - 1) and mantissa bits, subnormals at exponent 0.

    `special`: "nan" if all ones mean NaN, "ieee" if the highest exponent means infinity and NaN.
    """
    bias, made = 2 ** (exponent - 1) - 1, list[float]()
    for code in range(2 ** (exponent + mantissa)):
        e, f = divmod(code, 2**mantissa)
        value = math.ldexp(f + (e > 0) * 2**mantissa, max(e, 1) - bias - mantissa)
        if special == "nan" and code == 2 ** (exponent + mantissa) - 1:
            value = math.nan
        elif special == "ieee" and e == 2**exponent - 1:
            value = math.nan if f else math.inf
        made.append(value)
    return (*made, *(-v for v in made))


GRIDS: dict[str, Grid] = {
    g.name: g
    for g in (
        *(Grid(f"int{b}", b) for b in range(2, 9)),
        Grid("sign", 1, (-1.0, 1.0)),
        Grid("ternary", 2, (-1.0, 0.0, 1.0), per_byte=5),
        Grid("nf4", 4, _NF4),
        Grid("fp4", 4, _floats(2, 1), even=True),
        Grid("fp6_e2m3", 6, _floats(2, 3), even=True),
        Grid("fp6_e3m2", 6, _floats(3, 2), even=True),
        Grid("fp8_e4m3", 8, _floats(4, 3, "nan"), even=True),
        Grid("fp8_e5m2", 8, _floats(5, 2, "ieee"), even=True),
    )
}


def grid(name: str) -> Grid:
    """The grid of that name. Errors: OptionError for an unknown one."""
    if name not in GRIDS:
        raise OptionError("unknown grid", where="grid", got=name, want=", ".join(GRIDS), fix="choose one of these")
    return GRIDS[name]
