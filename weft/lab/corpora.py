"""Texts that every installation has: Python sources, C++ headers, and what functions say of themselves."""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from weft.error import ResourceError
from weft.learn.data import Pair, Text

TRAIN = ("stdlib", "numpy", "scipy", "torch")
"""Packages to calibrate, choose and tune on."""
HELD_OUT = ("networkx", "jinja2", "fsspec", "filelock", "yaml", "rich", "packaging", "tqdm")
"""Packages to test on; ref-lm has not seen them."""
HEADERS_TRAIN = ("ATen/native", "ATen/core", "ATen/cpu", "c10/util", "torch/csrc/jit")
HEADERS_HELD_OUT = (
    "c10/core",
    "torch/nn",
    "torch/optim",
    "torch/data",
    "torch/csrc/autograd",
    "torch/csrc/distributed",
)
_SKIP = (
    "site-packages",
    "/tests/",
    "/test/",
    "/testing/",
    "idle_test",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "_sysconfigdata",
    "_vendor",
)


def python_source(packages: Sequence[str], nbytes: int, *, seed: int = 0) -> list[Text]:
    """About `nbytes` of Python source, in pieces, from these packages; another order of files for another seed."""
    return _pieces([p for name in packages for p in _python_files(name)], nbytes, seed)


def cpp_headers(folders: Sequence[str], nbytes: int, *, seed: int = 0) -> list[Text]:
    """About `nbytes` of the C++ headers that PyTorch installs, in pieces."""
    root = _package("torch") / "include"
    found = [(f"{folder}/{p.name}", p) for folder in folders for p in sorted((root / folder).rglob("*.h"))]
    return _pieces(found, nbytes, seed)


@cache
def docstring_pairs(packages: tuple[str, ...], count: int, *, seed: int = 0) -> tuple[Pair, ...]:
    """Up to `count` functions: what the first line of the docstring says, and the source without the docstring."""
    made: dict[str, Pair] = {}
    for name, path in _shuffled([p for package in packages for p in _python_files(package)], seed):
        for pair in _functions(name, path):
            made.setdefault(pair.query, pair)
        if len(made) >= count:
            break
    return tuple(made.values())[:count]


def _package(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    found = find_spec(name)
    if found is None or found.origin is None:
        want = f"the package {name}"
        raise ResourceError(
            "a package of the corpus is not installed", where=name, got="nothing", want=want, fix=f"pip install {name}"
        )
    return Path(found.origin).parent


@cache
def _python_files(package: str) -> tuple[tuple[str, Path], ...]:
    root = str(_package(package))
    found: list[tuple[str, Path]] = []
    for folder, inner, files in os.walk(root):
        inside = folder[len(root) :].replace(os.sep, "/") + "/"
        inner[:] = [d for d in inner if not any(s in f"{inside}{d}/" for s in _SKIP)]
        found += [
            (f"{package}{inside}{f}", Path(folder, f))
            for f in files
            if f.endswith(".py") and not any(s in inside + f for s in _SKIP)
        ]
    return tuple(sorted(found))


def _shuffled(files: Sequence[tuple[str, Path]], seed: int) -> list[tuple[str, Path]]:
    return sorted(files, key=lambda f: hashlib.blake2b(f"{seed} {f[0]}".encode(), digest_size=8).digest())


def _pieces(files: Sequence[tuple[str, Path]], nbytes: int, seed: int, size: int = 4096) -> list[Text]:
    """The first `size` bytes or so of each file, at line ends, until there is enough; lines seen before count against a file."""
    made: list[Text] = []
    seen: set[str] = set()
    used = 0
    for name, path in _shuffled(files, seed):
        text = _read(path)
        if text is None:
            continue
        held = text[:size].rpartition("\n")[0] + "\n"
        lines = {line.strip() for line in held.splitlines() if len(line.strip()) > 20}
        if len(held) < 400 or len(lines - seen) < 0.6 * len(lines):
            continue
        seen |= lines
        made.append(Text(held, name))
        used += len(held.encode())
        if used >= nbytes:
            break
    return made


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf8")
    except (UnicodeDecodeError, OSError):
        return None


def _functions(name: str, path: Path) -> Iterator[Pair]:
    text = _read(path)
    if text is None:
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)) and len(node.body) > 1:
            query = " ".join(said.split("\n\n")[0].split())
            first = node.body[0]
            source = "\n".join(lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno])
            if 30 <= len(query) <= 200 and len(source) >= 80 and not query.startswith(("Parameters", "Args", ":param")):
                yield Pair(query, source[:240], f"{name}:{node.lineno}")
