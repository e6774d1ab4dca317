"""The methods that exist: the files in weft/methods/VERB/. No list by hand; listing imports nothing."""

from __future__ import annotations

import importlib

from weft.catalog import files
from weft.engine.method import METHODS, Method
from weft.error import OptionError


def names() -> list[str]:
    """Every method's name."""
    return list(files())


def get(name: str) -> Method:
    """The method of that name, imported when first asked for. Errors: OptionError for an unknown one."""
    if name not in files():
        raise OptionError(
            "unknown method", where="method", got=name, want=", ".join(files()), fix="weft methods lists them"
        )
    importlib.import_module(f"weft.methods.{files()[name].parent.name}.{name}")
    return METHODS[name]
