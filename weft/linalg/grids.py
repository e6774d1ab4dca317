"""Fit a grid to weights: scales and zero points by range or by search, and rounding to the nearest code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from weft.grid import grid

TINY = 1e-30


@dataclass(frozen=True)
class Fitted:
    """A grid placed on a matrix: a scale (a bfloat16 value, held as float32) and perhaps a zero point for every group."""

    name: str
    group: int
    scales: Float[Tensor, "m g"]
    zeros: UInt8[Tensor, "m g"] | None

    def zero(self) -> Float[Tensor, "m g"]:
        """Zero points as float32, also where the grid is symmetric."""
        if self.zeros is not None:
            return self.zeros.float()
        return torch.full_like(self.scales, 0.0 if grid(self.name).levels else 2 ** (grid(self.name).bits - 1))


def grouped(w: Float[Tensor, "m n"], group: int) -> Float[Tensor, "m g k"]:
    """Columns by group; a short last group is filled with zeros."""
    size = group or w.shape[1]
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).view(w.shape[0], math.ceil(w.shape[1] / size), size)


def minmax(w: Float[Tensor, "m n"], name: str, group: int, symmetric: bool) -> Fitted:
    """The grid that just covers each group's range. Symmetric: absmax / (2^(bits-1) - 1), or absmax on table grids."""
    spec, x = grid(name), grouped(w.float(), group)
    top = 2**spec.bits - 1
    if symmetric:
        reach = 1.0 if spec.levels else float(2 ** (spec.bits - 1) - 1)
        return Fitted(name, group, _scale(x.abs().amax(-1) / reach), None)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scales = _scale((high - low) / top)
    return Fitted(name, group, scales, (-low / scales).round().clamp(0, top).to(torch.uint8))


_SHRINK = {2: 0.45, 3: 0.6, 4: 0.7}
"""The smallest share of the range worth trying, by bits: fewer levels gain more from clipping."""


def search(
    w: Float[Tensor, "m n"], weight: Float[Tensor, "#m n"], name: str, group: int, symmetric: bool, *, steps: int = 8
) -> Fitted:
    """The grid of least Σ_j weight_ij (w_ij - q_ij)² in each group, among shrunken ranges; never worse than `minmax`.

    A symmetric integer grid has one more level below zero than above, so its full range is tried from both sides.
    """
    x = grouped(w.float(), group)  # [m g k]
    v = grouped(weight.float().clamp(min=0), group)  # [1 g k] or [m g k]
    v = torch.where(v.sum(-1, keepdim=True) > 0, v, torch.ones_like(v))
    start = minmax(w, name, group, symmetric)
    best, scales, zeros = _miss(x, v, start), start.scales, start.zero()
    for trial in _trials(x, name, group, symmetric, steps):
        miss = _miss(x, v, trial)
        better = miss < best
        best = torch.where(better, miss, best)
        scales, zeros = torch.where(better, trial.scales, scales), torch.where(better, trial.zero(), zeros)
    return Fitted(name, group, scales, None if symmetric else zeros.to(torch.uint8))


def _trials(x: Float[Tensor, "m g k"], name: str, group: int, symmetric: bool, steps: int) -> Iterator[Fitted]:
    spec, least = grid(name), _SHRINK.get(grid(name).bits, 0.85)
    top, half = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    for shrink in torch.linspace(1, least, steps).tolist():
        if symmetric and spec.levels is None:
            yield Fitted(name, group, _scale(torch.maximum(-low / half, high / (half - 1)) * shrink), None)
            yield Fitted(name, group, _scale(torch.maximum(-low, high) / half * shrink), None)
        elif symmetric:
            yield Fitted(name, group, _scale(torch.maximum(-low, high) * shrink), None)
        else:
            s = _scale((high - low) * shrink / top)
            yield Fitted(name, group, s, (-low * shrink / s).round().clamp(0, top).to(torch.uint8))


def _scale(s: Float[Tensor, "m g"]) -> Float[Tensor, "m g"]:
    """Rounded to bfloat16; a group of zeros gets 1. NaN stays, so that it is seen."""
    s = s.to(torch.bfloat16).float()
    return torch.where(s <= TINY, torch.ones_like(s), s)


def _miss(x: Float[Tensor, "m g k"], v: Float[Tensor, "#m g k"], fit: Fitted) -> Float[Tensor, "m g"]:
    """The weighted squared error of each group."""
    scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
    miss = value(_codes(x / scale, zero, fit.name), zero, fit.name).mul_(scale).sub_(x).square_()
    return torch.einsum("mgk,mgk->mg", miss, v.expand_as(miss))


def _codes(x: Tensor, zero: Tensor, name: str) -> Tensor:
    spec = grid(name)
    if spec.levels is None:
        return x.add_(zero).round_().clamp_(0, 2**spec.bits - 1)
    levels = torch.tensor(spec.levels, device=x.device)
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).float()


def value(codes: Tensor, zero: Tensor, name: str) -> Tensor:
    """What float codes mean before the scale."""
    levels = grid(name).levels
    return codes - zero if levels is None else torch.tensor(levels, device=codes.device)[codes.long()]


def nearest(w: Float[Tensor, "m n"], fit: Fitted) -> UInt8[Tensor, "m n"]:
    """The nearest code of every entry."""
    scale, zero = fit.scales.unsqueeze(-1), fit.zero().unsqueeze(-1)
    codes = _codes(grouped(w.float(), fit.group) / scale, zero, fit.name)
    return codes.flatten(1)[:, : w.shape[1]].to(torch.uint8)
