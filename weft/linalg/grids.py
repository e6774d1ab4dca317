"""Fit a grid to weights: scales and zero points by range or by search, and rounding to the nearest code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from weft.expr import Quantized
from weft.grid import grid, scale_format

TINY = 1e-30


@dataclass(frozen=True)
class Fitted:
    """A grid placed on a matrix: for every group a scale that its format holds, as float32, and perhaps a zero point."""

    name: str
    group: int
    scales: Float[Tensor, "m g"]
    zeros: UInt8[Tensor, "m g"] | None
    scale: str = "bf16"
    divisor: Float[Tensor, "m 1"] | None = None

    def zero(self) -> Float[Tensor, "m g"]:
        """Zero points as float32, also where the grid is symmetric."""
        if self.zeros is not None:
            return self.zeros.float()
        return torch.full_like(self.scales, 0.0 if grid(self.name).levels else 2 ** (grid(self.name).bits - 1))

    def encode(self, codes: UInt8[Tensor, "m n"]) -> Quantized:
        """The node of these codes."""
        scale, divisor = self.scale, self.divisor
        return Quantized.encode(
            codes, self.scales, self.zeros, grid=self.name, group=self.group, scale=scale, divisor=divisor
        )

    def placed(self, scales: Float[Tensor, "m g"], zeros: UInt8[Tensor, "m g"] | None = None) -> Fitted:
        """The same grid with other scales, the nearest that its format holds; 1 for a group of zeros."""
        scales = torch.where(scales <= TINY, torch.ones_like(scales), scales)
        return replace(self, scales=scale_format(self.scale).snap(scales, self.divisor), zeros=zeros)

    def mixed(self, other: Fitted, chosen: Bool[Tensor, "m g"]) -> Fitted:
        """This grid, and another of the same kind for the groups that are chosen."""
        zeros = None if self.zeros is None or other.zeros is None else torch.where(chosen, other.zeros, self.zeros)
        return replace(self, scales=torch.where(chosen, other.scales, self.scales), zeros=zeros)


def _place(name: str, group: int, scales: Float[Tensor, "m g"], scale: str, like: Fitted | None) -> Fitted:
    """A grid with these scales, the nearest that its format holds; with the row divisors of `like`."""
    divisor = scale_format(scale).divisor(scales) if like is None else like.divisor
    return Fitted(name, group, scales, None, scale, divisor).placed(scales)


def grouped(w: Float[Tensor, "m n"], group: int) -> Float[Tensor, "m g k"]:
    """Columns by group; a short last group is filled with zeros."""
    size = group or w.shape[1]
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).view(w.shape[0], math.ceil(w.shape[1] / size), size)


def minmax(
    w: Float[Tensor, "m n"], name: str, group: int, symmetric: bool, scale: str = "bf16", like: Fitted | None = None
) -> Fitted:
    """The grid that just covers each group's range. Symmetric: absmax / (2^(bits-1) - 1), or absmax / top on table grids.

    Signs cover no range: theirs is the mean of |w|, which is nearest to w. A power of two as scale is the least under which the
    largest entry still rounds to the top level. `like`: a grid whose row divisors are kept.
    """
    spec, x = grid(name), grouped(w.float(), group)
    top = 2**spec.bits - 1
    if not symmetric:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        step = (high - low) / top
        fit = _place(name, group, step.log2().ceil().exp2() if scale == "e8m0" else step, scale, like)
        return replace(fit, zeros=(-low / fit.scales).round().clamp(0, top).to(torch.uint8))
    most, reach = x.abs().amax(-1), spec.top if spec.levels else float(2 ** (spec.bits - 1) - 1)
    if name == "sign":
        sizes = grouped(torch.ones_like(w[:1]), group).sum(-1)
        return _place(name, group, x.abs().sum(-1) / sizes, scale, like)
    if scale == "e8m0":
        gap = float(spec.ascending[0].diff()[-1]) if spec.levels else 1.0
        return _place(name, group, ((most / (reach + gap / 2)).log2().floor() + 1).exp2(), scale, like)
    return _place(name, group, most / reach, scale, like)


_SHRINK = {1: 0.3, 2: 0.45, 3: 0.6, 4: 0.7}
"""The smallest share of the range worth trying, by bits: fewer levels gain more from clipping."""


def search(
    w: Float[Tensor, "m n"],
    weight: Float[Tensor, "#m n"],
    name: str,
    group: int,
    symmetric: bool,
    *,
    steps: int = 8,
    scale: str = "bf16",
    like: Fitted | None = None,
) -> Fitted:
    """The grid of least Σ_j weight_ij (w_ij - q_ij)² in each group, among shrunken ranges; never worse than `minmax`.

    A symmetric integer grid has one more level below zero than above, so its full range is tried from both sides.
    """
    x, v = grouped(w.float(), group), _importance(weight, group)
    found = start = minmax(w, name, group, symmetric, scale, like)
    best = _miss(x, v, start)
    for trial in _trials(x, start, steps):
        miss = _miss(x, v, trial)
        found, best = found.mixed(trial, miss < best), torch.fmin(miss, best)
    return found


def refine(w: Float[Tensor, "m n"], weight: Float[Tensor, "#m n"], fit: Fitted, *, steps: int = 4) -> Fitted:
    """Alternate nearest codes and their best grid (`refit`); each group keeps what gave it the least weighted error."""
    x, v = grouped(w.float(), fit.group), _importance(weight, fit.group)
    best, now = _miss(x, v, fit), fit
    for _ in range(steps):
        now = refit(w, weight, nearest(w, now), now)
        miss = _miss(x, v, now)
        fit, best = fit.mixed(now, miss < best), torch.fmin(miss, best)
    return fit


def refit(w: Float[Tensor, "m n"], weight: Float[Tensor, "#m n"], codes: UInt8[Tensor, "m n"], fit: Fitted) -> Fitted:
    """The grid of least Σ_j weight_ij (w_ij - scale (code_ij - zero))² in each group for these codes, before the scale is snapped.

    scale = Σ v w (c - z) / Σ v (c - z)². What that saves, (Σ v w (c - z))² / Σ v (c - z)², has a single maximum over real z,
    so the best whole z is next to it or the first or last code. Where no positive scale gains anything the group stays as it was.
    """
    v, x = _importance(weight, fit.group), grouped(w.float(), fit.group)
    c = value(grouped(codes.float(), fit.group), torch.zeros(()), fit.name)
    found, most = fit, torch.zeros_like(fit.scales)
    for z in [fit.zero()] if fit.zeros is None else _beside(_level(x, v, c), grid(fit.name).count - 1):
        level = c - z.unsqueeze(-1)
        along, square = (torch.einsum("mgk,mgk->mg", v * level, t) for t in (x, level))
        scale = torch.where(along > 0, along / square, 0.0)
        trial = fit.placed(scale, None if fit.zeros is None else z.to(torch.uint8))
        saved = scale * along.clamp(min=0)
        found, most = found.mixed(trial, saved > most), torch.fmax(saved, most)
    return found


def _level(x: Float[Tensor, "m g k"], v: Float[Tensor, "#m g k"], c: Float[Tensor, "m g k"]) -> Float[Tensor, "m g"]:
    """The real zero point of the least weighted error: where the line of best fit through (x, c) meets x = 0."""
    total = v.sum(-1)
    middle, mean = (v * c).sum(-1) / total, (v * x).sum(-1) / total
    dev = c - middle.unsqueeze(-1)
    return middle - mean * (v * dev.square()).sum(-1) / (v * dev * (x - mean.unsqueeze(-1))).sum(-1)


def _beside(zero: Float[Tensor, "m g"], top: int) -> list[Float[Tensor, "m g"]]:
    """The whole zero points next to a real one, and both ends."""
    low = zero.nan_to_num(0.0).floor()
    return [z.clamp(0, top) for z in (low, low + 1, torch.zeros_like(low), torch.full_like(low, top))]


def _importance(weight: Float[Tensor, "#m n"], group: int) -> Float[Tensor, "#m g k"]:
    """Weights by group, not negative; where a group has none, all its entries count alike."""
    v = grouped(weight.float().clamp(min=0), group)
    return torch.where(v.sum(-1, keepdim=True) > 0, v, grouped(torch.ones_like(weight), group))


def _trials(x: Float[Tensor, "m g k"], start: Fitted, steps: int) -> Iterator[Fitted]:
    spec = grid(start.name)
    least, half, top = _SHRINK.get(spec.bits, 0.85), 2 ** (spec.bits - 1), 2**spec.bits - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    for shrink in (2, 0.5) if start.scale == "e8m0" else torch.linspace(1, least, steps).tolist():
        if start.zeros is not None:
            trial = start.placed((high - low) * shrink / top)
            yield replace(trial, zeros=(-low * shrink / trial.scales).round().clamp(0, top).to(torch.uint8))
        elif start.scale == "e8m0":
            yield start.placed(start.scales * shrink)
        elif spec.levels is None:
            yield start.placed(torch.maximum(-low / half, high / (half - 1)) * shrink)
            yield start.placed(torch.maximum(-low, high) / half * shrink)
        else:
            yield start.placed(torch.maximum(-low, high) / spec.top * shrink)


def _miss(x: Float[Tensor, "m g k"], v: Float[Tensor, "#m g k"], fit: Fitted) -> Float[Tensor, "m g"]:
    """The weighted squared error of each group."""
    scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
    miss = value(_codes(x / scale, zero, fit.name), zero, fit.name).mul_(scale).sub_(x).square_()
    return torch.einsum("mgk,mgk->mg", miss, v.expand_as(miss))


def _codes(x: Tensor, zero: Tensor, name: str) -> Tensor:
    spec = grid(name)
    if spec.levels is None:
        return x.add_(zero).round_().clamp_(0, 2**spec.bits - 1)
    return spec.nearest(x)


def value(codes: Tensor, zero: Tensor, name: str) -> Tensor:
    """What float codes mean before the scale."""
    return codes - zero if grid(name).levels is None else grid(name).value(codes)


def nearest(w: Float[Tensor, "m n"], fit: Fitted) -> UInt8[Tensor, "m n"]:
    """The nearest code of every entry."""
    scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
    codes = _codes(grouped(w.float(), fit.group) / scale, zero, fit.name)
    return codes.flatten(1)[:, : w.shape[1]].to(torch.uint8)


def rounded(w: Float[Tensor, "m n"], fit: Fitted) -> Float[Tensor, "m n"]:
    """The nearest value of every entry: bit for bit what the node of its codes holds, and NaN where w is."""
    scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
    made = value(_codes(grouped(w.float(), fit.group) / scale, zero, fit.name), zero, fit.name) * scale
    return made.flatten(1)[:, : w.shape[1]]
