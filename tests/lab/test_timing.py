"""Paired times and memory of a process."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest

from weft.error import OptionError
from weft.lab.timing import anonymous, paired


class Clock:
    """A clock that what is timed moves."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def takes(self, name: str, seconds: float, slower: float = 0.0) -> Callable[[], None]:
        def act() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + slower * len(self.calls))

        return act


def test_ratios_are_of_runs_beside_each_other() -> None:
    """A machine that slows down all the time leaves the ratio, and who runs first changes every round."""
    clock = Clock()
    made = paired(clock.takes("a", 2.0, 0.1), clock.takes("b", 4.0, 0.1), rounds=20, warm=2, clock=lambda: clock.now)
    assert made.ratio.low < 0.5 < made.ratio.high and made.ratio.high - made.ratio.low < 0.1
    assert made.ratio.mean == pytest.approx(0.5, rel=0.05) and made.ours < made.baseline
    assert len(clock.calls) == 44 and "".join(clock.calls[4:12]) == "abbaabba"


def test_a_steady_ratio_is_exact() -> None:
    """With an interval of no width."""
    clock = Clock()
    made = paired(clock.takes("a", 3.0), clock.takes("b", 2.0), clock=lambda: clock.now)
    assert np.allclose(
        [made.ours, made.baseline, made.ratio.mean, made.ratio.low, made.ratio.high], [3, 2, 1.5, 1.5, 1.5]
    )
    with pytest.raises(OptionError, match="rounds"):
        paired(clock.takes("a", 1), clock.takes("b", 1), rounds=1)


def test_memory_that_is_written_to_counts() -> None:
    """Fifty million bytes are seen; a process that is not there has none."""
    before = anonymous()
    held = np.ones(50_000_000, dtype=np.uint8)
    assert anonymous(os.getpid()) - before > 40_000_000 and held.sum() == 50_000_000
    assert anonymous(1 << 30) == 0
