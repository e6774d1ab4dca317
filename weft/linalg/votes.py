"""Task vectors that disagree: keep the large entries, elect a sign for each, and take the mean of those that have it."""

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
