"""Memory that is free goes back to the system: the C library keeps it, in a heap that large and small blocks fragment."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


@functools.cache
def _trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


def release() -> None:
    """Give free memory back where the C library can (glibc): milliseconds, for use between blocks of work."""
    if (trim := _trim()) is not None:
        trim(0)
