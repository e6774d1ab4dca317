"""Hints to the system (Linux): begin to write now what is synced later, and to read now what is needed soon. Elsewhere nothing."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from threading import Event, Semaphore, Thread
from typing import Any

from torch import Tensor

_CHUNK, _AHEAD = 16 << 20, 32
"""Bytes a hint, and hints that are ahead of what was read."""


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def write_soon(fd: int, start: int, size: int) -> None:
    """Begin to write these bytes of a file to disk: a sync at the end finds little left, and writing is not held up before."""
    if (libc := _libc()) is not None and hasattr(libc, "sync_file_range"):
        libc.sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(size), 2)


@contextmanager
def reading_ahead(tensors: Iterable[Tensor]) -> Generator[Callable[[Tensor], None]]:
    """While open, mapped tensors are read from disk in this order, at most `_CHUNK` x `_AHEAD` bytes before they are needed.

    Yields what to call with each tensor that is no longer needed.
    """
    libc, window, over = _libc(), Semaphore(_AHEAD), Event()

    def read() -> None:
        for t in tensors:
            for start, size in _pages(t):
                window.acquire()
                if over.is_set():
                    return
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), 3)

    reader = Thread(target=read, daemon=True) if libc is not None else None
    if reader is not None:
        reader.start()

    def done(t: Tensor) -> None:
        if chunks := len(_pages(t)):
            window.release(chunks)

    try:
        yield done
    finally:
        over.set()
        window.release()
        if reader is not None:
            reader.join()


def _pages(t: Tensor) -> list[tuple[int, int]]:
    """The whole pages that a tensor lies in, in chunks: address and size."""
    if t.device.type != "cpu" or not t.is_contiguous():
        return []
    start = t.data_ptr() & -mmap.PAGESIZE
    end = t.data_ptr() + t.numel() * t.element_size()
    return [(at, min(_CHUNK, end - at)) for at in range(start, end, _CHUNK)]
