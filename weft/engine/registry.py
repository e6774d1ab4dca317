"""The methods that exist: the files in weft/methods/VERB/. No list by hand; listing imports nothing."""

from __future__ import annotations

import importlib

from weft.catalog import files
from weft.engine.method import METHODS, Method
from weft.error import FormatError, OptionError


def names() -> list[str]:
    """Every method's name."""
    return list(files())


def get(name: str) -> Method:
    """The method of that name, imported when first asked for. Errors: OptionError for an unknown one, FormatError for a broken file."""
    if name not in files():
        raise OptionError(
            "unknown method", where="method", got=name, want=", ".join(files()), fix="weft methods lists them"
        )
    try:
        importlib.import_module(f"weft.methods.{files()[name].parent.name}.{name}")
        return METHODS[name]
    except (ImportError, SyntaxError, NameError, TypeError, KeyError) as e:
        got, want = f"{type(e).__name__}: {e}", f"a module with a method called {name}"
        what, fix = "a method's file cannot be used", "mend the file"
        raise FormatError(what, where=files()[name], got=got, want=want, fix=fix) from e
