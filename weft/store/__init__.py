"""The only code that opens model files: audited reads, whole writes."""

from weft.store.load import find, load
from weft.store.mend import import_
from weft.store.save import may_write, nbytes, save, stored
from weft.store.swap import verify

__all__ = ["find", "import_", "load", "may_write", "nbytes", "save", "stored", "verify"]
