"""Work on tensors behind the thread that makes them."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

from torch import Tensor

Job = Callable[[str, Tensor], None]


class Behind:
    """Every job in a thread of its own, on one tensor after another, of which it holds at most `most` bytes, or one.

    After one that failed, that job does no more, and its error is raised where the next tensor is given, or at the end.
    """

    def __init__(self, most: int, *jobs: Job) -> None:
        self.most, self._jobs, self._held, self._bytes = most, jobs, ExitStack(), 0
        self._threads = [self._held.enter_context(ThreadPoolExecutor(1, initializer=_give_way)) for _ in jobs]
        self._last: Sequence[Future[None] | None] = [None] * len(jobs)
        self._under_way: deque[tuple[int, list[Future[None]]]] = deque()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._held:
            while error is None and self._under_way:
                self._first()

    def room(self, size: int) -> None:
        """Wait until so many bytes more may be held. Errors: those of the jobs."""
        while self._under_way and self._bytes + size > self.most:
            self._first()

    def give(self, name: str, value: Tensor) -> None:
        """A tensor for every job; where the caller forgets it, it is gone with the last of them."""
        shares = [value] * len(self._jobs)
        each = zip(self._threads, self._jobs, self._last, strict=True)
        made = [thread.submit(_done, job, last, name, shares) for thread, job, last in each]
        self._last = made
        self._under_way.append((value.nbytes, made))
        self._bytes += value.nbytes

    def _first(self) -> None:
        """Wait for what was given first."""
        size, jobs = self._under_way.popleft()
        for job in jobs:
            job.result()
        self._bytes -= size


def _give_way() -> None:
    """Leave the processor to the threads that make tensors, which wait for one another (Linux)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _done(job: Job, last: Future[None] | None, name: str, shares: list[Tensor]) -> None:
    if last is not None:
        last.result()
    job(name, shares.pop())
