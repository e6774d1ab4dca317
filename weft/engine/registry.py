"""The methods that exist: the files in weft/methods/VERB/. No list by hand; listing imports nothing."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import weft
from weft.engine.method import METHODS, Method
from weft.error import OptionError

_ROOT = Path(weft.__file__).parent / "methods"


@cache
def files() -> dict[str, Path]:
    """Method name to file, in order of name. Errors: OptionError if two files share a name."""
    found: dict[str, Path] = {}
    for path in sorted(_ROOT.glob("*/[!_]*.py")):
        if path.stem in found:
            raise OptionError(
                "two methods share a name",
                where=path.stem,
                got=str(path),
                want="one file",
                fix=f"rename one; the other is {found[path.stem]}",
            )
        found[path.stem] = path
    return dict(sorted(found.items()))


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
