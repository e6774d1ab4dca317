"""Time as ratios of runs beside each other, and the memory of a process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.error import OptionError, whole
from weft.lab.bootstrap import Interval, interval


@dataclass(frozen=True)
class Times:
    """Medians of both in seconds, and the geometric mean of ours / baseline, round by round, with its 95 % interval."""

    ours: float
    baseline: float
    ratio: Interval


def paired(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    rounds: int = 10,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[], object] | None = None,
) -> Times:
    """Run both once a round, each first in every other one, after `warm` rounds that do not count; `between` is done before each.

    What slows the machine for a while slows both, and cancels. Errors: OptionError for fewer than two rounds.
    """
    whole(0, warm=warm)
    if rounds < 2:
        want, fix = "2 or more: an interval needs them", "raise it"
        raise OptionError("too few rounds", where="rounds", got=rounds, want=want, fix=fix)
    seconds = np.zeros((rounds, 2))
    for r in range(-warm, rounds):
        for side in (0, 1) if r % 2 == 0 else (1, 0):
            if between is not None:
                between()
            begun = clock()
            (ours, baseline)[side]()
            if r >= 0:
                seconds[r, side] = clock() - begun
    logs = interval(np.log(seconds[:, 0] / seconds[:, 1])[None])
    mean, low, high = (float(np.exp(x)) for x in (logs.mean, logs.low, logs.high))
    mine, theirs = (statistics.median(seconds[:, side].tolist()) for side in (0, 1))
    return Times(mine, theirs, Interval(mean, low, high))


def anonymous(pid: int | None = None) -> int:
    """Bytes that a process (this one) holds in memory and no file backs; 0 where it is gone, or the system does not tell."""
    try:
        lines = Path(f"/proc/{pid or os.getpid()}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
