"""Paired intervals."""

from __future__ import annotations

import numpy as np

from weft.lab.bootstrap import interval


def sample(rng: np.random.Generator, seeds: int = 10, documents: int = 60) -> np.ndarray:
    """Scores with an effect of the document, one of the seed, and noise; their mean is 1."""
    noise = rng.normal(size=(seeds, documents))
    return 1 + noise + rng.normal(size=documents) + 0.3 * rng.normal(size=(seeds, 1))


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    """95 % of intervals, give or take what 120 samples tell."""
    rng = np.random.default_rng(1)
    found = [interval(sample(rng)) for _ in range(120)]
    share = np.mean([i.low <= 1 <= i.high for i in found])
    assert 0.88 <= share <= 1 and all(i.low < i.mean < i.high for i in found)


def test_what_both_arms_share_cancels() -> None:
    """The difference of two arms on the same documents is known far better than either."""
    rng = np.random.default_rng(2)
    base = sample(rng)
    other = base + 0.1 + 0.01 * rng.normal(size=base.shape)
    alone, paired = interval(other), interval(other - base)
    assert paired.detectable < alone.detectable / 20
    assert paired.low > 0 and paired.low < 0.1 < paired.high


def test_a_fixed_shift_has_an_interval_of_no_width() -> None:
    """Nothing varies, nothing to resample."""
    found = interval(np.full((3, 5), -0.25))
    assert (found.mean, found.low, found.high, found.detectable) == (-0.25, -0.25, -0.25, 0)


def test_weights_count_documents_by_their_size() -> None:
    """The mean is the weighted one; a document of no weight says nothing."""
    values, weights = np.array([[1.0, 5.0, 1e9]]), np.array([[3.0, 1.0, 0.0]])
    found = interval(values, weights)
    assert found.mean == 2 and found.high <= 5


def test_the_same_numbers_give_the_same_interval() -> None:
    """Randomness is fixed."""
    values = sample(np.random.default_rng(3))
    assert interval(values) == interval(values.copy())
