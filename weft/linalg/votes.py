"""Task vectors that disagree: keep some entries of each, then add them, or elect a sign a place and average or add those that have it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor


def trimmed(delta: Float[Tensor, "m n"], density: float) -> Float[Tensor, "m n"]:
    """The share `density` of entries with the largest |d_ij|, at least one, and their equals in size; the rest is zero."""
    size = delta.abs()
    keep = max(1, round(density * size.numel()))
    return delta * (size >= size.flatten().kthvalue(size.numel() - keep + 1).values)


def inliers(delta: Float[Tensor, "m n"], outliers: float) -> Float[Tensor, "m n"]:
    """Zero in place of the largest entries, at most the share `outliers` of all: none of those that are as large as what stays."""
    size = delta.abs()
    return delta * (size <= size.flatten().kthvalue(size.numel() - int(outliers * size.numel())).values)


def odds(delta: Float[Tensor, "m n"], density: float, spread: float) -> Float[Tensor, "m n"]:
    """The probability p_ij of staying: it grows evenly with the rank of |d_ij| within its row, and is `density` in the mean.

    p = density + spread · min(density, 1 - density) · ((2 rank + 1) / n - 1), the smallest entry's rank being 0.
    """
    rank, room = delta.abs().argsort(dim=1, stable=True).argsort(dim=1), min(density, 1 - density)
    return density + spread * room * ((2 * rank + 1) / delta.shape[1] - 1)


def drawn(delta: Float[Tensor, "m n"], p: Float[Tensor, "m n"], rng: torch.Generator) -> Float[Tensor, "m n"]:
    """d_ij with probability p_ij, else zero."""
    return torch.where(torch.rand(delta.shape, generator=rng) < p, delta, 0.0)


def as_large(kept: Float[Tensor, "m n"], delta: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """What is kept of a delta, times the factor that makes its entries add up to as much in absolute value; zero stays."""
    left = kept.abs().sum()
    return kept * torch.where(left > 0, delta.abs().sum() / left, 1.0)


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
