"""Task vectors that disagree: keep some entries of each, then add them, or elect a sign a place and average or add those that have it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

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


def trimmed(delta: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """The share `density` of entries with the largest |d_ij|, at least one, and their equals in size; the rest is zero."""
    return delta * (delta.abs() >= limit(lambda: [delta], kept(density, delta.numel())))


def kept(density: float, count: int) -> int:
    """How many of so many entries a share is: one at least."""
    return max(1, round(density * count))


def odds(delta: Float[Tensor, "m n"], density: float, spread: float) -> Float[Tensor, "m n"]:
    """The probability p_ij of staying: it grows evenly with the rank of |d_ij| within its row, and is `density` in the mean.

    p = density + spread · min(density, 1 - density) · ((2 rank + 1) / n - 1), the smallest entry's rank being 0.
    """
    rank, room = delta.abs().argsort(dim=1, stable=True).argsort(dim=1), min(density, 1 - density)
    return density + spread * room * ((2 * rank + 1) / delta.shape[1] - 1)


def drawn(delta: Float[Tensor, "m n"], p: Float[Tensor, "m n"], rng: torch.Generator) -> Float[Tensor, "m n"]:
    """d_ij with probability p_ij, else zero."""
    return torch.where(torch.rand(delta.shape, generator=rng) < p, delta, 0.0)


def summed(votes: Iterable[tuple[float, Float[Tensor, "m n"]]]) -> Float[Tensor, "m n"]:
    """Σ_k w_k d_k, one delta in memory at a time."""
    total = torch.zeros(())
    for w, d in votes:
        total = total + w * d
    return total


def elected(votes: Iterable[tuple[float, Float[Tensor, "m n"]]]) -> Float[Tensor, "m n"]:
    """The weighted mean of the entries whose sign is that of Σ_k w_k d_k: of each place, zero where nothing or both signs have it.

    One delta is in memory at a time.
    """
    up = down = above = below = torch.zeros(())
    for w, d in votes:
        up, down = up + w * d.clamp(min=0), down - w * d.clamp(max=0)
        above, below = above + w * (d > 0), below + w * (d < 0)
    won = torch.where(up > down, up / above, -down / below)
    return torch.where(up == down, 0.0, won)


def agreed(votes: Iterable[tuple[float, Float[Tensor, "m n"]]]) -> Float[Tensor, "m n"]:
    """Σ w_k d_k over the entries whose sign is that of Σ_k w_k d_k; of each place, zero where nothing or both signs have it."""
    up = down = torch.zeros(())
    for w, d in votes:
        up, down = up + w * d.clamp(min=0), down - w * d.clamp(max=0)
    return torch.where(up > down, up, -down) * (up != down)
