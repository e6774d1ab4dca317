"""The only code that opens model files: audited reads, whole writes."""

from weft.store.adapter import attach
from weft.store.hotswap import hotswap
from weft.store.load import find, load
from weft.store.mend import import_
from weft.store.save import may_write, nbytes, save, stored
from weft.store.swap import verify

__all__ = ["attach", "find", "hotswap", "import_", "load", "may_write", "nbytes", "save", "stored", "verify"]
