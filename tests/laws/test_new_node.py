"""A new node is one file, the one in the documents: it is found, checked, saved and cut by its annotations alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import weft

PAGE = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf8")
CIRCULANT = PAGE.split("```python\n", 1)[1].split("```", 1)[0]
"""The file that the documents show."""
USES = {
    "it is imported like any other": """
from weft.expr import Circulant
assert Circulant is NODES["Circulant"]
try:
    from weft.expr import Circulent
except ImportError:
    pass
else:
    raise SystemExit("it was found")
""",
    "it is built from its saved form, with its default": """
made = build({"node": "Circulant"}, {"c": torch.arange(3.0)}.__getitem__)
assert spec(made) == {"node": "Circulant", "turn": 0} and list(tensors(made)) == ["c"] and made.nbytes() == 12
assert made.dense().tolist() == [[0, 2, 1], [1, 0, 2], [2, 1, 0]]
""",
    "it multiplies, in slices too": """
import weft.expr.base as base
made, x = NODES["Circulant"](torch.randn(5)), torch.randn(4, 5)
for base.CHUNK in (5, 1 << 24):
    torch.testing.assert_close(made(x), x @ made.dense().T)
assert torch.equal(made.rows(torch.tensor([2, 0])), made.dense()[[2, 0]])
""",
    "a wrong field is named": """
from weft.error import ShapeError
for wrong in ({"c": torch.zeros(2, 2)}, {"c": torch.zeros(2), "turn": True}):
    try:
        NODES["Circulant"](**wrong)
    except ShapeError as e:
        assert e.where == f"Circulant.{list(wrong)[-1]}"
    else:
        raise SystemExit("it was taken")
""",
    "a second node of that name is refused": """
from weft.error import ShapeError
try:
    type("Circulant", (Expr,), {"__module__": "elsewhere"})
except ShapeError as e:
    assert e.got == "weft.expr.circulant"
else:
    raise SystemExit("it was taken")
""",
    "an annotation that is no field's is refused": """
from weft.error import ShapeError
made = type("Odd", (Expr,), {"__module__": "elsewhere", "__annotations__": {"size_of": tuple[int, int]}})
try:
    made((1, 2))
except ShapeError as e:
    assert e.where == "Odd.size_of"
else:
    raise SystemExit("it was taken")
""",
}


EACH = """
import json, sys, traceback
import torch
from weft.expr import NODES, Expr, build, spec, tensors
for name, use in json.load(sys.stdin).items():
    try:
        exec(use, dict(globals()))
        said = ""
    except BaseException:
        said = traceback.format_exc()
    print(json.dumps([name, said]))
"""
"""Runs each use apart from the others' names, and says what went wrong in it."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each use, in one process for all, whose algebra is a copy with one file more."""
    root, source = tmp_path_factory.mktemp("grown"), Path(weft.__file__).parent
    for part in ("expr", "grid"):
        shutil.copytree(source / part, root / "weft" / part)
    for part in ("__init__.py", "error.py"):
        shutil.copy(source / part, root / "weft")
    (root / "weft" / "expr" / "circulant.py").write_text(CIRCULANT)
    made = subprocess.run(
        [sys.executable, "-c", EACH],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        input=json.dumps(USES),
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return dict(json.loads(line) for line in made.stdout.splitlines())


@pytest.mark.parametrize("use", USES)
def test_one_file_is_a_node(use: str, said: dict[str, str]) -> None:
    """With nothing else changed, in a process that never saw the algebra without it."""
    assert said[use] == "", said[use]
