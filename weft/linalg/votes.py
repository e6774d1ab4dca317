"""Task vectors that disagree: keep some entries of each, then add them, or elect a sign a place and average or add those that have it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

Vote = tuple[float, Float[Tensor, "m n"]]
"""A weight and a delta."""
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def limit(parts: Callable[[], Iterable[Float[Tensor, "m n"]]], rank: int) -> float:
    """The size |d_ij| that is the `rank`-th largest of all entries of these float32 or float64 parts, exactly; none is kept.

    Sizes are in the order of their bits as integers: sixteen bits are found at a time, by counting, in a pass over the parts.
    """
    found, left, shift, kind = 0, rank, 0, torch.float32
    for turn in itertools.count():
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in parts():
            kind, width = part.dtype, 8 * part.element_size()
            bits, shift = part.abs().view(_BITS[kind]).flatten(), width - 16 * (turn + 1)
            if turn:
                bits = bits[bits >> (shift + 16) == found]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        above = counts.flip(0).cumsum(0)
        place = int((above < left).sum())
        left -= int(above[place - 1]) if place else 0
        found = found << 16 | (0xFFFF - place)
        if not shift:
            break
    return float(torch.tensor(found, dtype=_BITS[kind]).view(kind))


def within(delta: Float[Tensor, "m n"], least: float, most: float = math.inf) -> Float[Tensor, "m n"]:
    """The entries with least ≤ |d_ij| ≤ most; the rest is zero."""
    size = delta.abs()
    small = size.le(most) if most < math.inf else None
    made = size.ge_(least).mul_(delta)  # masks as numbers: several times as fast as booleans
    return made if small is None else made.mul_(small)


def trimmed(delta: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """The share `density` of entries with the largest |d_ij|, at least one, and their equals in size; the rest is zero."""
    return within(delta, limit(lambda: [delta], kept(density, delta.numel())))


def kept(density: float, count: int) -> int:
    """How many of so many entries a share is: one at least."""
    return max(1, round(density * count))


def odds(delta: Float[Tensor, "m n"], density: float, spread: float) -> Float[Tensor, "m n"]:
    """The probability p_ij of staying: it grows evenly with the rank of |d_ij| within its row, and is `density` in the mean.

    p = density + spread · min(density, 1 - density) · ((2 rank + 1) / n - 1), the smallest entry's rank being 0.
    """
    rank, room = delta.abs().argsort(dim=1, stable=True).argsort(dim=1), min(density, 1 - density)
    return density + spread * room * ((2 * rank + 1) / delta.shape[1] - 1)


def drawn(delta: Float[Tensor, "m n"], p: Float[Tensor, "m n"], draws: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """d_ij where the draw from [0, 1) is less than p_ij, else zero. The draws are overwritten."""
    return delta * draws.lt_(p)


def summed(votes: Iterable[Vote]) -> Float[Tensor, "m n"]:
    """Σ_k w_k d_k, one delta in memory at a time."""
    total = torch.zeros(())
    for w, d in votes:
        total = torch.add(total, d, alpha=w)
    return total


def elected(votes: Iterable[Vote]) -> Float[Tensor, "m n"]:
    """The weighted mean of the entries whose sign is that of Σ_k w_k d_k: of each place, zero where nothing or both signs have it."""
    mass, count = _won(votes)
    return mass.div_(count).nan_to_num_(0.0, math.inf, -math.inf)


def agreed(votes: Iterable[Vote]) -> Float[Tensor, "m n"]:
    """Σ w_k d_k over the entries whose sign is that of Σ_k w_k d_k; of each place, zero where nothing or both signs have it."""
    return _won(votes)[0]


def _won(votes: Iterable[Vote]) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"]]:
    """Σ w_k d_k and Σ w_k over the entries whose sign is that of Σ_k w_k d_k. All deltas are in memory at once."""
    held = list(votes)
    sign = summed(held).sign_()
    mass, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, d in held:
        votes_so = (d * sign).gt_(0)
        mass.addcmul_(votes_so, d, value=w)
        count.add_(votes_so, alpha=w)
    return mass, count
