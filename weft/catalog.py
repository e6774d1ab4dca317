"""The methods that exist, read from their files without importing them: the folder is the list."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from weft.error import OptionError

ROOT = Path(__file__).parent / "methods"


@dataclass(frozen=True)
class Entry:
    """One method: its name, the verb (folder), its kind, one line of help, and the paper's arXiv number."""

    name: str
    verb: str
    kind: str
    help: str
    paper: str


@cache
def files() -> dict[str, Path]:
    """Method name to file, in order of name. Errors: OptionError if two files share a name."""
    found: dict[str, Path] = {}
    for path in sorted(ROOT.glob("*/[!_]*.py")):
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


@cache
def entries() -> tuple[Entry, ...]:
    """Every method, by verb and name."""
    return tuple(sorted((_entry(p) for p in files().values()), key=lambda e: (e.verb, e.name)))


def _entry(path: Path) -> Entry:
    tree = ast.parse(path.read_bytes())
    said = next(iter((ast.get_docstring(tree) or "").splitlines()), "")
    given = next((_decorator(f) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == path.stem), {})
    return Entry(path.stem, path.parent.name, given.get("kind", ""), said, given.get("paper", ""))


def _decorator(fn: ast.FunctionDef) -> dict[str, str]:
    """The text arguments of `@method(...)`."""
    calls = [
        d
        for d in fn.decorator_list
        if isinstance(d, ast.Call) and isinstance(d.func, ast.Name) and d.func.id == "method"
    ]
    pairs = [(k.arg, k.value) for call in calls for k in call.keywords]
    return {a: v.value for a, v in pairs if a and isinstance(v, ast.Constant) and isinstance(v.value, str)}
