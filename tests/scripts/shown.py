"""The commands that a page shows, run as they stand there but for sizes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner

from weft.cli.app import build

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands(page: str, title: str) -> list[list[str]]:
    """The commands of a section."""
    (section,) = [s for s in (DOCS / page).read_text("utf8").split("\n## ") if s.startswith(title)]
    blocks = section.split("```")[1::2]
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("weft ")]


def scores(page: str, title: str, small: Mapping[str, str], more: Mapping[str, list[str]]) -> list[float]:
    """Run them one after another, other values behind the options of `small` and `more` behind those commands; what `eval` told."""
    told: list[float] = []
    for words in commands(page, title):
        given = [small.get(before, word) for before, word in zip(["", *words], words, strict=False)][1:]
        given += more.get(given[0], [])
        made = CliRunner().invoke(build(given), given, catch_exceptions=False)
        assert made.exit_code == 0, (given, made.output)
        told += [json.loads(made.stdout)[0]["mean"]] if given[0] == "eval" else []
    return told
