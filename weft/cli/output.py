"""Standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer


def emit(rows: Sequence[dict[str, Any]], *, as_json: bool, quiet: bool = False, foot: str = "") -> None:
    """Rows as a JSON list, or as a table with its foot unless quiet."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=1, default=str))
    elif not quiet:
        typer.echo(table(rows))
        if foot:
            typer.echo(foot)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns, numbers to the right; nothing is cut."""
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), *([_text(v) for v in r.values()] for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    right = [all(isinstance(list(r.values())[i], int | float | None) for r in rows) for i in range(len(widths))]
    made = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in made)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return (
            " x ".join(map(str, value))
            if all(isinstance(v, int) for v in value) and value
            else ", ".join(map(str, value))
        )
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
