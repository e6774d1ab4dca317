"""Packed products: which of torch's kernels multiply a quantized leaf as it is, and how its codes are laid out for them.

A kernel has the rows of inputs up to which it beats making the leaf dense; beyond them, and where no kernel takes a leaf, the
product is dense, as it is on other devices than the CPU, under autocast and in what torch.compile traces. The levels before
scales must be evenly spaced, as those of integers, sign, ternary, fp4 and fp6_e2m3 are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor

from weft.expr.derived import Derived
from weft.grid import grid

if TYPE_CHECKING:
    from weft.expr.nodes import Quantized

Layout = tuple[Tensor, ...]
_INT4: Any = torch.ops.aten._weight_int4pack_mm_for_cpu.default
_BAGS: Any = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
_SIZES = (256, 128, 64, 32)
"""The groups that torch's 4-bit product knows."""
_FINER = 16
"""The second column of a correction counts in this part of the first one's steps."""
MOST = 16
"""Rows of inputs beyond which no kernel is ahead."""
_BAG = 256
"""Columns in a partial sum where a row has one scale."""
_TILE = 128
"""Outputs that an embedding bag makes at a time: few enough that its rows lie close together, many enough for their overhead."""


@dataclass(frozen=True)
class Kernel:
    """A packed product: how a leaf is laid out for it, and x [t n] times the transposed value."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    rows: Callable[[Quantized], int]
    """Up to how many rows of inputs it is used; 0 where it does not take the leaf."""
    lay_out: Callable[[Quantized], Layout]
    multiply: Callable[[Float[Tensor, "t n"], Quantized, Layout], Float[Tensor, "t m"]]


_CHOICES: dict[tuple[object, ...], list[tuple[int, Kernel]]] = {}
"""Kernels that compute in a dtype, and up to how many rows, by what decides it."""


def kernel(leaf: Quantized, dtype: torch.dtype, rows: int) -> Kernel | None:
    """The kernel for so many rows of inputs of this dtype; None where the product is dense."""
    kind = (leaf.grid, leaf.scale, leaf.group, leaf.n, leaf.symmetric, dtype)
    if kind not in _CHOICES:  # what follows costs as much as a tenth of a product where the caches are cold
        _CHOICES[kind] = [(k.rows(leaf), k) for k in KERNELS if dtype in k.dtypes]
    return next((k for most, k in _CHOICES[kind] if 0 < rows <= most), None)


def packed_product(x: Float[Tensor, "*b n"], leaf: Quantized) -> Float[Tensor, "*b m"] | None:
    """x times the transposed value by a kernel, in x's dtype; None where there is no kernel for it."""
    m, n = leaf.shape
    rows = x.numel() // n if n and m else 0
    if rows > MOST or not (x.is_cpu and leaf.data.is_cpu) or torch.compiler.is_compiling():
        return None
    found = None if torch.is_autocast_enabled("cpu") else kernel(leaf, x.dtype, rows)
    if found is None:
        return None
    layout = leaf.derive(found.name, lambda: Derived((leaf,), found.lay_out(leaf)))
    y = found.multiply(x if x.dim() == 2 else x.reshape(rows, n), leaf, layout.value)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], m)


def _numbers(leaf: Quantized) -> tuple[UInt8[Tensor, "m n"], float, float]:
    """Every code as a whole number k, with the step and the least such that value = (least + step k) scale."""
    spec, codes = grid(leaf.grid), leaf.codes()
    step, least, numbers = cast(tuple[float, float, tuple[int, ...]], spec.steps)
    if spec.levels is not None:
        table = torch.tensor(numbers, dtype=torch.uint8)
        return table.index_select(0, codes.int().view(-1)).view(codes.shape), step, least
    zeros = leaf.zeros()
    if not isinstance(zeros, Tensor):
        return codes, step, -zeros
    top = spec.count - 1  # code - zero lies between -top and top
    return (codes + (top - leaf.spread(zeros).to(torch.uint8))), step, -float(top)


def _even(leaf: Quantized, most: int) -> bool:
    """Whether the grid's levels are evenly spaced, `most` steps from least to largest at most."""
    return _span(leaf.grid) <= most


@functools.cache
def _span(name: str) -> float:
    """Steps from the least to the largest of evenly spaced levels; infinite for others."""
    steps = grid(name).steps
    return math.inf if steps is None else max(steps[2])


def _short_scales(leaf: Quantized) -> bool:
    """Whether bfloat16 holds the scales exactly."""
    return leaf.scale in ("bf16", "e8m0")


# ------------------------------------------------------------------------------------------------------------ four bits


def _rows_int4(leaf: Quantized) -> int:
    return MOST if _even(leaf, 15) and _short_scales(leaf) and leaf.group % _SIZES[-1] == 0 else 0


def _size(leaf: Quantized) -> int:
    """The largest group of the kernel that a group, or a row, is made of; a row of no such size is padded."""
    return next((s for s in _SIZES if (leaf.group or leaf.n) % s == 0), _SIZES[-1])


def _lay_out_int4(leaf: Quantized) -> Layout:
    """Codes u in blocks, and (s, z) [groups m 2] such that value = (u - 8) s + z.

    What bfloat16 leaves out of z follows as more columns of codes, a pair for each group (`_corrected`); nothing if it is all 0.
    """
    (m, n), size = leaf.shape, _size(leaf)
    scales, groups = leaf.scales(), -(-n // size)
    if leaf.symmetric:
        numbers, step, least = _numbers(leaf)
        shift = round(-least / step)
        codes, offset = numbers + (8 - shift), (least + shift * step) * scales
    else:
        codes, step, offset = leaf.codes(), 1.0, (8 - cast(Tensor, leaf.zeros())) * scales
    pairs = torch.stack([scales * step, offset], -1)
    pairs = (
        pairs.expand(-1, groups, -1) if leaf.groups == 1 else pairs.repeat_interleave(leaf.group // size, 1)[:, :groups]
    )
    short, codes = pairs.bfloat16(), F.pad(codes, (0, -n % size))
    rest = pairs[..., 1] - short[..., 1].float()
    if bool(rest.any()):
        more, steps = _corrections(rest, size)
        codes = torch.cat([codes, more], 1)
        short = torch.cat([short, torch.stack([steps, torch.zeros_like(steps)], -1)], 1)
    codes, short = F.pad(codes.int(), (0, 0, 0, -m % 16)), F.pad(short, (0, 0, 0, 0, 0, -m % 16))
    packed = cast(Tensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    return packed, short.transpose(0, 1).contiguous()


def _corrections(rest: Float[Tensor, "m groups"], size: int) -> tuple[UInt8[Tensor, "m k"], BFloat16[Tensor, "m more"]]:
    """rest = ((a - 8) + (b - 8) / 16) s, to s / 32: of every `size` codes the first half are a, the others b, under one step s."""
    few = F.pad(rest, (0, -rest.shape[1] % (size // 2))).unflatten(1, (-1, size // 2))
    steps = few.abs().amax(-1).div(7).bfloat16()
    at = (few / steps.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]).clamp(-8, 7)
    first = at.round()
    second = ((at - first) * _FINER).round().clamp(-8, 7)
    return (torch.cat([first, second], -1).flatten(1) + 8).to(torch.uint8), steps


def _corrected(x: Float[Tensor, "t n"], size: int, more: int) -> Float[Tensor, "t k"]:
    """Inputs with the sum of every group behind them, and again with a sixteenth of it, as `_corrections` has its codes."""
    sums = x.view(x.shape[0], -1, size).sum(-1)
    if over := -sums.shape[1] % (size // 2):
        sums = F.pad(sums, (0, over))
    if more == 1:
        return torch.cat([x, sums, sums / _FINER], 1)
    sums = sums.view(x.shape[0], more, -1)
    return torch.cat([x, torch.cat([sums, sums / _FINER], -1).view(x.shape[0], -1)], 1)


def _multiply_int4(x: Float[Tensor, "t n"], leaf: Quantized, layout: Layout) -> Float[Tensor, "t m"]:
    packed, pairs = layout
    size = 2 * packed.shape[1] // pairs.shape[0]
    x = _padded(x, size)
    if more := pairs.shape[0] - x.shape[1] // size:
        x = _corrected(x, size, more)
    y: Tensor = _INT4(x, packed, size, pairs)
    return y[:, : leaf.shape[0]].contiguous() if y.shape[1] > leaf.shape[0] else y


def _padded(x: Float[Tensor, "t n"], size: int) -> Float[Tensor, "t k"]:
    """Columns up to a whole number of groups."""
    over = -x.shape[1] % size
    return F.pad(x, (0, over)) if over else x.contiguous()


# ----------------------------------------------------------------------------------------------- eight bits, a scale a row


def _rows_int8(leaf: Quantized) -> int:
    good = _even(leaf, 255) and _short_scales(leaf) and leaf.groups == 1 and leaf.symmetric
    return MOST if good and leaf.grid != "sign" else 0  # sign has no zero to count from


def _lay_out_int8(leaf: Quantized) -> Layout:
    """Signed codes [m n], columns padded to whole sixteens, and scales [m]."""
    numbers, step, least = _numbers(leaf)
    signed = (numbers.short() + round(least / step)).to(torch.int8)
    return F.pad(signed, (0, -leaf.n % 16)), (leaf.scales().view(-1) * step).bfloat16()


def _multiply_int8(x: Float[Tensor, "t n"], leaf: Quantized, layout: Layout) -> Float[Tensor, "t m"]:
    return cast(Tensor, torch.ops.aten._weight_int8pack_mm(_padded(x, 16), *layout))


# ---------------------------------------------------------------------------------------- any group, exact up to float32


def _rows_bag(leaf: Quantized) -> int:
    good = _even(leaf, 255 if leaf.symmetric else 127) and (leaf.group == 0 or leaf.group >= 16)
    if not good or "fbgemm" not in torch.backends.quantized.supported_engines:
        return 0
    return 8 if grid(leaf.grid).bits == 8 else MOST  # whole bytes are made dense sooner


def _lay_out_bag(leaf: Quantized) -> Layout:
    """The transposed numbers, `_TILE` outputs at a time [tiles n], as rows of an embedding table with (step, least) behind each;

    indices of all, starts of groups, and scales [tiles g outputs].
    """
    numbers, step, least = _numbers(leaf)
    m, n, size = *leaf.shape, leaf.group or _BAG
    tiled = F.pad(numbers, (0, 0, 0, -m % _TILE)).view(-1, _TILE, n).transpose(1, 2).reshape(-1, _TILE)
    pair = torch.tensor([step, least]).view(torch.uint8)
    table = torch.cat([tiled, pair.expand(len(tiled), -1)], 1)
    starts = torch.arange(0, len(tiled), n, dtype=torch.int32).unsqueeze(1) + torch.arange(0, n, size)
    ends = torch.cat([starts.flatten(), torch.tensor([len(tiled)])]).int()
    scales = F.pad(leaf.scales(), (0, 0, 0, -m % _TILE)).view(-1, _TILE, leaf.groups).transpose(1, 2).contiguous()
    return table, torch.arange(len(tiled), dtype=torch.int32), ends, scales


def _multiply_bag(x: Float[Tensor, "t n"], leaf: Quantized, layout: Layout) -> Float[Tensor, "t m"]:
    """A group's columns, each times its input, are summed as an embedding bag sums rows; then the groups with their scales."""
    table, every, ends, scales = layout
    tiles, m = len(table) // leaf.n, leaf.shape[0]
    out = x.new_empty(len(x), m)
    for row, y in zip(x.float(), out, strict=True):
        weights = row.expand(tiles, -1).reshape(-1)
        sums: Tensor = _BAGS(table, every, ends, False, 0, False, weights, None, True).view(tiles, -1, _TILE)
        made = sums.mul_(scales).sum(1) if leaf.group else sums.sum(1).mul_(scales[:, 0])
        y.copy_(made.view(-1)[:m])
    return out


KERNELS = (
    Kernel("int4pack", (torch.bfloat16,), _rows_int4, _lay_out_int4, _multiply_int4),
    Kernel("int8pack", (torch.bfloat16,), _rows_int8, _lay_out_int8, _multiply_int8),
    Kernel("bag", (torch.float32, torch.bfloat16, torch.float16), _rows_bag, _lay_out_bag, _multiply_bag),
)
"""In order of preference; `rows` as measured by benchmarks/products.py."""
