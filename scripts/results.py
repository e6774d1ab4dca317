"""Write docs/results.md from the reports of `weft fit`, from proofs/ and from benchmarks/measured.md.

    python scripts/results.py [out/results/ref-lm out/results/minilm ...]

Tables of models that are not given stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from weft.report import words
from weft.report.page import read
from weft.report.schema import Report

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
NOTES = ROOT / "benchmarks" / "measured.md"
HEAD = """# Results

Each table is printed by the command above it, on two cores; `python scripts/results.py OUT...` writes this page from the
reports. Every arm takes no more bytes than the budget, adapters included, and gets the same tuning: same data, steps,
adapter bytes. Scores are on test data that nothing was chosen by; intervals are 95 %, paired, over seeds and documents.
A difference above zero means that fit is ahead.
"""


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def section(report: Report) -> str:
    """One run: command, comparison, and how right its predictions were."""
    digits = words.places(report)
    rows = [["budget", "stage", "arm", "choice", "MB", f"{report.metric.name}", "difference to fit", ""]]
    for budget, row in words.rows(report):
        rows.append(
            [
                budget.budget,
                row.stage,
                words.NAMES[row.arm],
                row.choice,
                words.megabytes(row.bytes),
                words.with_interval(row.score, digits),
                words.with_interval(row.versus_fit, digits, signed=True),
                words.verdict(row.versus_fit),
            ]
        )
    tuned = (
        ""
        if report.original.tuned_score is None
        else f", {words.number(report.original.tuned_score, digits)} after the same tuning"
    )
    checks = {(c.predicted, c.measured) for b in report.budgets for c in b.checks if c.predicted > 0 and c.measured > 0}
    ratio = np.array([measured / predicted for predicted, measured in checks])
    return "\n\n".join(
        [
            f"### {report.model.name} on {report.data.name}",
            f"```\n{report.command}\n```",
            f"The original scores {words.number(report.original.score, digits)}{tuned}. {len(report.seeds)} seeds, "
            f"{report.data.test_documents} test documents.",
            table(rows),
            f"Measured over predicted {report.objective.name}, {len(checks)} whole-model choices: median {np.median(ratio):.2f}, "
            f"middle half {np.quantile(ratio, 0.25):.2f} to {np.quantile(ratio, 0.75):.2f}.",
        ]
    )


def claims() -> str:
    """The verdicts of the papers' claims."""
    rows = [["method", "claim", "verdict", "models"]]
    for path in sorted((ROOT / "proofs").glob("*.json")):
        held = json.loads(path.read_text())
        if "verdict" in held:
            models = ", ".join(f"{m['model']}: {m['verdict']}" for m in held["models"])
            rows.append([f"`{path.stem}`", held["claim"], held["verdict"], models])
    return table(rows)


def _written() -> list[str]:
    """The tables of runs that the page has."""
    text = PAGE.read_text().partition("\n## Claims of the papers")[0]
    return [part.rstrip() for part in re.split(r"(?m)^(?=### )", text)[1:]]


def main() -> int:
    """Write the page."""
    made = [section(read(Path(p) / "report.json")) for p in sys.argv[1:]]
    tables = {text.partition("\n")[0]: text for text in [*_written(), *made]}
    parts = [
        HEAD,
        "## Compression and tuning at equal bytes",
        *tables.values(),
        "## Claims of the papers",
        "```\nmake prove\n```",
        claims(),
    ]
    PAGE.write_text("\n\n".join([*parts, NOTES.read_text()]).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
