"""Memory that is free goes back to the system: the C library keeps it, in a heap that large and small blocks fragment."""

from __future__ import annotations

import ctypes
import functools
import gc
from typing import Any


@functools.cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


def release(*, models: bool = False) -> None:
    """Give free memory back where the C library can (glibc): milliseconds, for use between blocks of work.

    `models`: first find those that are gone but refer to themselves, which takes a second.
    """
    if models:
        gc.collect()
    if (trim := _trim()) is not None:
        trim(0)
