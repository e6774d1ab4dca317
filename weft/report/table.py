"""The comparison as a table for the terminal."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.report import words
from weft.report.schema import Report, Row

_COLOURS = {"fit ahead": "green", "fit behind": "red"}


def comparison(report: Report) -> Table:
    """Every arm and stage of every budget beside the original."""
    digits = words.places(report)
    table = Table(
        title=_text(f"{report.model.name}: {report.metric.name} ({report.metric.unit}), lower is better"),
        caption=f"difference: the arm minus fit; 95 % intervals over documents and {_seeds(report)}",
        box=box.SIMPLE_HEAD,
    )
    for name in ("budget", "arm", "stage", "choice"):
        table.add_column(name, overflow="fold")
    for name in ("MB", "share", "score", "difference to fit"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    last = ""
    for budget, row in words.rows(report):
        if last and budget.budget != last:
            table.add_section()
        table.add_row(_text(budget.budget if budget.budget != last else ""), *_cells(row, digits))
        last = budget.budget
    table.add_section()
    was = report.original
    table.add_row("", "original", "", "", words.megabytes(was.bytes), "", words.number(was.score, digits), "", "")
    if was.tuned_score is not None:
        table.add_row("", "original", "tuned", "", "", "", words.number(was.tuned_score, digits), "", "")
    return table


def text(report: Report, width: int = 160) -> str:
    """The comparison as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(comparison(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n") + "\n"


def _cells(row: Row, digits: int) -> list[Text]:
    word = words.verdict(row.versus_fit)
    score = words.with_interval(row.score, digits)
    gap = words.with_interval(row.versus_fit, digits, signed=True)
    plain = [row.arm, row.stage, row.choice, words.megabytes(row.bytes), words.percent(row.share), score, gap]
    return [*map(_text, plain), Text(word, style=_COLOURS.get(word, ""))]


def _seeds(report: Report) -> str:
    return "1 seed" if len(report.seeds) == 1 else f"{len(report.seeds)} seeds"


def _text(value: str) -> Text:
    """A cell without markup and without control characters, so that a name cannot steer the terminal."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value))
