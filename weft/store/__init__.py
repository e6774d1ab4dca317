"""The only code that opens model files: audited reads, whole writes."""

from weft.store.load import find, load
from weft.store.save import nbytes, save, stored
from weft.store.swap import verify

__all__ = ["find", "load", "nbytes", "save", "stored", "verify"]
