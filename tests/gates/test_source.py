"""What every file of weft/ must keep to: one direction of imports, one error type, no unsafe calls, small pieces."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weft
from weft import error

ROOT = Path(weft.__file__).parent.parent
FILES = sorted((ROOT / "weft").rglob("*.py"))
TREES = {f: ast.parse(f.read_text(encoding="utf-8")) for f in FILES}
ORDER = (
    "error", "catalog", "progress", "memory", "nets", "grid", "expr", "linalg", "model", "store", "stats", "learn",
    "engine", "methods", "lab", "report", "fitting", "score", "merging", "mergekit", "harness", "api", "training", "cli",
)  # fmt: skip
"""Lowest first: a package imports only from those before it, and from itself."""
WORDS = "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"])


def test_the_gate_reads_something() -> None:
    """There is source to check, and every package of it has a place in the order."""
    assert len(FILES) > 40
    assert {package(f) for f in FILES} - {"__init__", "__main__"} <= set(ORDER)


def package(path: Path) -> str:
    """The part of weft a file belongs to."""
    return path.relative_to(ROOT / "weft").with_suffix("").parts[0]


def module(path: Path) -> str:
    """A file's dotted name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def at(path: Path, node: ast.AST) -> str:
    """Where something stands, for people."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def eager(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module does: neither in functions nor under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from eager([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from eager([*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)])
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from eager(node.body)


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """What a file imports, by full dotted name, relative imports resolved."""
    for node in eager(TREES[path].body):
        if isinstance(node, ast.Import):
            yield from ((node, a.name) for a in node.names)
            continue
        above = module(path).split(".")[: -node.level] if node.level and path.name != "__init__.py" else []
        if node.level and path.name == "__init__.py":
            above = module(path).split(".")[: -1 - (node.level - 1)]
        name = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((node, f"{name}.{a.name}") for a in node.names)


def test_imports_point_one_way() -> None:
    """No package imports one above it; report reads error and store alone; a method imports no method."""
    wrong: list[str] = []
    for path in FILES:
        own = package(path)
        for node, name in imports(path):
            other = name.split(".")[1] if name.startswith("weft.") else ""
            if own not in ORDER or other not in ORDER or own == other != "methods":
                continue
            narrow = own == "report" and other not in ("error", "store")
            if ORDER.index(other) > ORDER.index(own) or narrow or own == other == "methods":
                wrong.append(f"{at(path, node)} imports {name}")
    assert not wrong, "\n".join(wrong)


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the dotted name of what is called."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node, ast.unparse(node.func)


def roots(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Every import, wherever it stands, with the top-level package it names."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            whole = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from ((node, name.split(".")[0]) for name in whole)


BANNED = "|".join(
    [
        r"(torch|joblib|np|numpy)\.load",
        r"(.*\.)?(pickle|cPickle|dill|shelve|marshal)\..*",
        r"eval|exec|compile|__import__|print",
        r"yaml\.(unsafe_)?load(_all)?",
        r"os\.(system|popen)",
    ]
)


def test_nothing_unsafe_is_called() -> None:
    """No pickle (but tensors, in `weft import`'s own process), no evaluation of text, no shell, no model's code, no print."""
    wrong = []
    for path in FILES:
        for node, name in calls(path):
            limited = path.name == "unpickle.py" and ast.unparse(node).count("weights_only=True") == 1
            if re.fullmatch(BANNED, name) and not (name == "torch.load" and limited):
                wrong.append(f"{at(path, node)} {name}")
        for node, name in calls(path):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False":
                wrong.append(f"{at(path, node)} {name}({given})")
        pickles = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib"}
        wrong += [f"{at(path, n)} imports {name}" for n, name in roots(path) if name in pickles]
    assert not wrong, "\n".join(wrong)


def test_only_the_store_opens_model_files() -> None:
    """safetensors is imported in weft/store and nowhere else, at the top or in a function."""
    outside = [f for f in FILES if package(f) != "store"]
    wrong = [at(path, n) for path in outside for n, name in roots(path) if name == "safetensors"]
    assert not wrong, "\n".join(wrong)


ERRORS = {n for n, c in vars(error).items() if isinstance(c, type) and issubclass(c, error.WeftError)}
PLAIN = {n for n, c in vars(builtins).items() if isinstance(c, type) and issubclass(c, BaseException)}


PROTOCOL = {
    "AttributeError": ("weft/__init__.py", "weft/expr/__init__.py"),
    "SystemExit": "weft/cli/",
    "typer.Exit": "weft/cli/",
}
"""What Python and typer themselves ask for: a module's __getattr__, and the exit code of the process."""


def test_only_weft_errors_are_raised() -> None:
    """`raise` names a WeftError, or passes on something caught or collected; never another exception class."""
    wrong, seen = [], 0
    for path in FILES:
        for node in ast.walk(TREES[path]):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            seen += 1
            made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(made)
            passes_on = isinstance(node.exc, ast.Name) and name not in PLAIN
            same_kind = isinstance(made, ast.Call) and ast.unparse(made.func) == "type"
            asked = name in PROTOCOL and at(path, node).startswith(PROTOCOL[name])
            if name not in ERRORS and not passes_on and not same_kind and not asked:
                wrong.append(f"{at(path, node)} raises {name}")
    assert seen > 50 and not wrong, "\n".join(wrong)


def test_pieces_are_small() -> None:
    """No file over 330 lines, no function over 60."""
    wrong = [f"{f.relative_to(ROOT)} has {n} lines" for f in FILES if (n := len(f.read_text().splitlines())) > 330]
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                wrong += [f"{at(path, node)} {node.name} has {size} lines"] if size > 60 else []
    assert not wrong, "\n".join(wrong)


TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt", ".cfg", ".html", ".css", ".js", ".sh", ""}
OUTSIDE = {".git", ".venv", "out", "demo", "dist", "site", "__pycache__", "node_modules"}


def tracked() -> Iterator[Path]:
    """Text files that belong to the project: all but what .gitignore names and hidden folders."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(
            p in OUTSIDE or p.endswith(".egg-info") or (p.startswith(".") and p != ".github") for p in parts[:-1]
        )
        if not hidden and path.suffix in TEXT and path.is_file() and path.name not in ("tokenizer.json", ".git"):
            yield path


def test_no_place_of_one_machine_and_nothing_left_to_do() -> None:
    """No path of somebody's machine in any text file, and no note that something is still to do."""
    place = re.compile(r"(?<![\w.~}])/(?:" + "|".join(["work", "root", "home"]) + r")(?:/|\b)(?!\w)")
    todo = re.compile(rf"\b(?:{WORDS})\b")
    wrong, seen = [], 0
    for path in tracked():
        seen += 1
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            wrong += (
                [f"{path.relative_to(ROOT)}:{i} {line.strip()[:80]}"] if place.search(line) or todo.search(line) else []
            )
    assert seen > len(FILES) and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_shell_starts_without_torch(arguments: list[str]) -> None:
    """`weft --help` answers without importing torch or transformers."""
    code = f"""
import sys
sys.argv = ["weft", *{arguments!r}]
from weft.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = sorted({{m.split(".")[0] for m in sys.modules}} & {{"torch", "transformers", "scipy", "numpy", "pandas"}})
print("heavy:", heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_algebra_knows_no_model() -> None:
    """weft.expr and weft.grid import with neither transformers nor a file format."""
    code = "import sys, weft.expr; print(sorted({'transformers', 'safetensors', 'weft.model'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
