"""Paired intervals: resample seeds and documents together, so that what both arms share cancels."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

ROUNDS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. `detectable`: half the interval, the smallest effect that would have shown."""

    mean: float
    low: float
    high: float

    @property
    def detectable(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def as_json(self) -> dict[str, float]:
        """All four numbers."""
        return {**asdict(self), "detectable": self.detectable}


def interval(values: Float[np.ndarray, "s k"], weights: Float[np.ndarray, "s k"] | None = None) -> Interval:
    """The weighted mean over documents k and seeds s (rows), seeds and documents resampled; fixed randomness.

    Pass the difference of two arms on the same documents for a paired interval.
    """
    weight = np.ones_like(values) if weights is None else weights
    rng = np.random.default_rng(0)
    s, k = values.shape
    rows = rng.integers(0, s, (ROUNDS, s))
    up, down = values * weight, weight
    counts = rng.multinomial(k, np.full(k, 1 / k), ROUNDS).astype(np.float64)  # [rounds k]
    top, bottom = counts @ up.T, counts @ down.T  # [rounds s]
    means = np.take_along_axis(top, rows, 1).sum(1) / np.maximum(np.take_along_axis(bottom, rows, 1).sum(1), 1e-300)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float((values * weight).sum() / max(float(weight.sum()), 1e-300)), float(low), float(high))
