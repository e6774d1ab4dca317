"""Bars: plain lines where nobody watches, and nothing for quick work."""

from __future__ import annotations

import io

import pytest

from weft.progress import Bars, Silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_silent_counts_nothing() -> None:
    with Silent().bar("x", 3) as step:
        step(1)


def test_quick_work_prints_nothing() -> None:
    out = io.StringIO()
    with Bars(out).bar("x", 2) as step:
        step(2)
    assert out.getvalue() == ""


def test_slow_work_prints_lines_and_its_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("weft.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Bars(out).bar("x", 40) as step:
        for _ in range(40):
            now[0] += 0.5
            step(1)
    assert out.getvalue().splitlines() == ["x: 4/40, 2 s", "x: 24/40, 12 s", "x: 40/40, 20 s"]


def test_a_terminal_gets_bars_even_inside_each_other_and_after_errors() -> None:
    out = Terminal()
    bars = Bars(out)
    with bars.bar("outer", 2) as outer, bars.bar("inner", 2) as inner:
        inner(1)
        outer(1)
    with pytest.raises(ValueError, match="x"), bars.bar("again", 1):
        raise ValueError("x")
    assert bars._live is None
    assert "outer" in out.getvalue() and "inner" in out.getvalue()
