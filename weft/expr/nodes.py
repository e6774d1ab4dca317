"""The leaves: dense, low-rank, diagonal, quantized."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import CHUNK, Expr, Promises, mapped
from weft.expr.kernels import packed_product
from weft.grid import grid as _grid
from weft.grid import pack, packed_bytes, scale_format, unpack


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

    def mapped(self, dim: int, values: Callable[[Tensor], Tensor], beside: Callable[[Expr], Expr]) -> Expr:
        return Dense(mapped(self.w, values))

    def describe(self) -> str:
        return str(self.w.dtype).removeprefix("torch.")


class LowRank(Expr):
    """A product of two thin factors. value = scale b a"""

    b: Float[Tensor, "m r"]
    a: Float[Tensor, "r n"]
    scale: float = 1.0

    def dense(self) -> Float[Tensor, "m n"]:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self._scaled(self.b.to(wide) @ self.a.to(wide))

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        return self._scaled(F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)))

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self._scaled(F.embedding(ids, self.b).to(wide) @ self.a.to(wide))

    def mapped(self, dim: int, values: Callable[[Tensor], Tensor], beside: Callable[[Expr], Expr]) -> Expr:
        return self.rebuild(a=mapped(self.a, values)) if dim else self.rebuild(b=mapped(self.b, values))

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.scale == 1 else value * self.scale

    def check(self) -> None:
        if not math.isfinite(self.scale):
            raise ShapeError(
                "LowRank.scale is not finite", where="LowRank.scale", got=self.scale, want="a number", fix="check it"
            )

    def promises(self) -> Promises:
        return Promises(rank=self.a.shape[0])

    def describe(self) -> str:
        return f"LowRank({self.a.shape[0]})" if self.scale == 1 else f"LowRank({self.a.shape[0]}, x {self.scale:g})"


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
    A row of `data` is: packed codes | scales in their format | packed zero points. `group` 0 means one group a row.
    Bytes, not floats, so no dtype cast can damage it.
    """

    data: UInt8[Tensor, "m bytes"]
    n: int
    grid: str
    group: int
    symmetric: bool
    scale: str = "bf16"

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
        scale: str = "bf16",
        divisor: Float[Tensor, "m 1"] | None = None,
    ) -> Quantized:
        """Pack codes, scales (rounded to their format; `divisor` None: the one that suits them) and zero points (None: symmetric)."""
        form = scale_format(scale)
        parts = [_grid(grid).pack(codes), form.encode(scales, form.divisor(scales) if divisor is None else divisor)]
        if zeros is not None:
            parts.append(pack(zeros, _grid(grid).bits))
        return cls(torch.cat(parts, 1), codes.shape[1], grid, group, zeros is None, scale)

    def check(self) -> None:
        spec, form = _grid(self.grid), scale_format(self.scale)
        want = spec.row_bytes(self.n) + form.row_bytes(self.groups)
        want += 0 if self.symmetric else packed_bytes(self.groups, spec.bits)
        if (self.group or self.n) < 1 or self.data.shape[1] != want or (spec.levels and not self.symmetric):
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
        spec = _grid(self.grid)
        return spec.unpack(self.data[:, : spec.row_bytes(self.n)], self.n)

    def scales(self) -> Float[Tensor, "m g"]:
        """The scales as float32."""
        return scale_format(self.scale).decode(self._scale_bytes())

    def divisor(self) -> Float[Tensor, "m 1"] | None:
        """What each row's scales are divided by, in formats that have it."""
        return scale_format(self.scale).read_divisor(self._scale_bytes())

    def _scale_bytes(self) -> UInt8[Tensor, "m bytes"]:
        at = _grid(self.grid).row_bytes(self.n)
        return self.data[:, at : at + scale_format(self.scale).row_bytes(self.groups)]

    def zeros(self) -> Float[Tensor, "m g"] | float:
        """The zero points as float32; one number where symmetric."""
        bits = _grid(self.grid).bits
        if self.symmetric:
            return float(2 ** (bits - 1))
        return unpack(self.data[:, -packed_bytes(self.groups, bits) :], bits, self.groups).float()

    def dense(self) -> Float[Tensor, "m n"]:
        spec = _grid(self.grid)
        if spec.levels is not None:
            value = spec.decode(self.data[:, : spec.row_bytes(self.n)], self.n)
        else:
            value, zeros = self.codes().float(), self.zeros()
            if isinstance(zeros, Tensor):
                self._each(value, zeros, torch.Tensor.sub_)
            else:
                value.sub_(zeros)
        self._each(value, self.scales(), torch.Tensor.mul_)
        return value

    def spread(self, per_group: Float[Tensor, "m g"]) -> Float[Tensor, "m n"]:
        """One value a group, repeated over the group's columns."""
        return spread(per_group, self.group, self.n)

    def times(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        y = packed_product(x, self)
        return super().times(x) if y is None else y

    def _each(
        self, value: Float[Tensor, "m n"], per_group: Float[Tensor, "m g"], act: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Act in place on every group's columns with the group's number; the last group may be shorter."""
        group = self.group or self.n
        full = self.n // group
        act(value[:, : full * group].unflatten(1, (full, group)), per_group[:, :full].unsqueeze(2))
        act(value[:, full * group :], per_group[:, full:])

    def promises(self) -> Promises:
        return Promises(levels=len(_grid(self.grid).ascending[0]) or _grid(self.grid).count)

    def describe(self) -> str:
        about = [f"g{self.group}" if self.group else "channel"]
        about += [] if self.symmetric else ["asymmetric"]
        about += [] if self.scale == "bf16" else [f"{self.scale} scales"]
        return f"{self.grid}[{', '.join(about)}]"


def spread(per_group: Float[Tensor, "m g"], group: int, n: int) -> Float[Tensor, "m n"]:
    """Repeat one value a group over its `group` columns (0: all), cut at `n`."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, n)
    return per_group.repeat_interleave(group, 1)[:, :n]
