"""Memory: what is free goes back to the system (the C library keeps it in a heap of fragments), and how much was in use at most."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@functools.cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


@contextmanager
def importing() -> Generator[None]:
    """While open, and for what was made until then, no cycles of objects are looked for: what imports make stays.

    That is a quarter of the time that they take. Nothing where torch is there already.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def release(*, models: bool = False) -> None:
    """Give free memory back where the C library can (glibc): milliseconds, for use between blocks of work.

    `models`: first find those that are gone but refer to themselves, which takes a second.
    """
    if models:
        gc.collect()
    if (trim := _trim()) is not None:
        trim(0)


def peak() -> int:
    """The most bytes so far: of CUDA tensors where CUDA is in use, otherwise of the process in memory, mapped files included."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
