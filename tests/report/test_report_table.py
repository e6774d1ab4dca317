"""The table in the terminal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from weft.report.schema import Report
from weft.report.table import comparison, text

Make = Callable[..., Report]


def test_it_holds_every_row_and_the_original(make: Make) -> None:
    report = make()
    made = comparison(report)
    assert made.row_count == sum(len(b.rows) for b in report.budgets) + 2
    assert made.columns[0].header == "budget"
    shown = text(report)
    for word in ("ref-lm", "27%", "40%", "uniform gptq", "compress + tune", "fit ahead", "original", "3 seeds"):
        assert word in shown


def test_one_seed_without_tuning(make: Make) -> None:
    report = make(tuned=False, seeds=1)
    assert comparison(report).row_count == 7
    assert "1 seed" in text(report) and "tune" not in text(report)


def test_it_is_plain_and_deterministic(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = text(make())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert text(make()) == before and "\x1b" not in before


def test_names_are_no_markup_and_do_not_steer_the_terminal(make: Make) -> None:
    report = make(tuned=False)
    rows = [r.model_copy(update={"choice": "[red]gptq[g64]\x1b[2J\n"}) for r in report.budgets[0].rows]
    shown = text(report.model_copy(update={"budgets": [report.budgets[0].model_copy(update={"rows": rows})]}))
    assert "[red]gptq[g64]" in shown and "\x1b" not in shown
