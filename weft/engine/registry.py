"""The methods that exist: the files in weft/methods/VERB/. No list by hand; listing imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

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


def apart(options: Mapping[str, Any], *methods: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The options of each of these methods, and those that are left. `METHOD_OPTION` is that method's, whatever others have.

    Errors: OptionError for one that two of the methods have.
    """
    owners: dict[str, list[str]] = {}
    for method in filter(None, methods):
        for name in get(method).options.model_fields:
            owners.setdefault(name, []).append(method)
            owners[f"{method}_{name}"] = [method]
    held: dict[str | None, dict[str, Any]] = {method: {} for method in (None, *methods)}
    for name, value in options.items():
        mine = owners.get(name, [None])
        if len(mine) > 1:
            got, want = f"{name}, which {' and '.join(map(str, mine))} have", "the method's name before it"
            fix = f"give {' or '.join(f'{m}_{name}' for m in mine)}"
            raise OptionError("an option is of two methods", where=name, got=got, want=want, fix=fix)
        held[mine[0]][name if mine[0] is None else name.removeprefix(f"{mine[0]}_")] = value
    return [held[m] if m is not None else {} for m in methods], held[None]
