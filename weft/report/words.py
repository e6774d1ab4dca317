"""Numbers and verdicts in words: the one place where the page and the tables take them from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from weft.report.schema import Arm, Budget, Interval, Report, Row, Stage

ARMS: tuple[Arm, ...] = ("fit", "uniform gptq", "uniform rtn")
STAGES: tuple[Stage, ...] = ("compress", "compress + tune")
NAMES: dict[Arm, str] = {"fit": "weft fit", "uniform gptq": "best uniform GPTQ", "uniform rtn": "best uniform rounding"}
NONE = "–"


def number(value: float | None, places: int, *, signed: bool = False) -> str:
    """A number with fixed places and a true minus; a sign only where it means something."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:+,.{places}f}" if signed else f"{value:,.{places}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def brief(value: float | None) -> str:
    """Three digits that matter, of any magnitude."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.3g}".replace("-", "−")


def percent(share: float, places: int = 1) -> str:
    """A share in percent."""
    return f"{number(100 * share, places)} %"


def round_percent(share: float) -> str:
    """A share in percent as people say it: 27 %, 6.3 %."""
    return percent(share, 0 if share >= 0.0995 else 1)


def megabytes(nbytes: int) -> str:
    """Bytes in MB without the unit."""
    return number(nbytes / 1e6, 2)


def size(nbytes: int) -> str:
    """Bytes with the unit that suits them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{number(value, 0 if value >= 100 else 1 if value >= 10 else 2)} {unit}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Seconds as s, min or h."""
    if seconds < 120:
        return f"{number(seconds, 1)} s"
    return f"{number(seconds / 60, 1)} min" if seconds < 7200 else f"{number(seconds / 3600, 1)} h"


def places(report: Report) -> int:
    """How many decimals of a score mean something: two digits of the typical detectable difference."""
    found = [i for _, row in rows(report) for i in (row.score, row.versus_fit) if i]
    widths = [i.detectable for i in found if 0 < i.detectable < math.inf]
    if not widths:
        return 4
    return min(max(1 - math.floor(math.log10(statistics.median(widths))), 2), 7)


def rows(report: Report) -> Iterator[tuple[Budget, Row]]:
    """Every row in reading order: budget, then stage, then fit before the uniform arms."""
    for budget in report.budgets:
        for row in sorted(budget.rows, key=lambda r: (STAGES.index(r.stage), ARMS.index(r.arm))):
            yield budget, row


def final_stage(budget: Budget) -> Stage:
    """The last stage that a budget has rows of."""
    return STAGES[max((STAGES.index(r.stage) for r in budget.rows), default=0)]


def final_rows(budget: Budget) -> dict[Arm, Row]:
    """Each arm's row at the last stage."""
    return {r.arm: r for r in budget.rows if r.stage == final_stage(budget)}


def span(interval: Interval, digits: int, *, signed: bool = False) -> str:
    """The ends of an interval."""
    return f"{number(interval.low, digits, signed=signed)} to {number(interval.high, digits, signed=signed)}"


def with_interval(interval: Interval | None, digits: int, *, signed: bool = False) -> str:
    """A mean and its interval; a dash for none."""
    if interval is None:
        return NONE
    return f"{number(interval.mean, digits, signed=signed)} ({span(interval, digits, signed=signed)})"


def verdict(versus_fit: Interval | None) -> str:
    """What a difference to fit says, in words: only an interval on one side of zero is a difference."""
    if versus_fit is None:
        return NONE
    if versus_fit.low > 0:
        return "fit ahead"
    return "fit behind" if versus_fit.high < 0 else "no detectable difference"


def headline(report: Report, budget: Budget) -> str:
    """One sentence for anyone: how large, how good, beside what."""
    digits, found = places(report), final_rows(budget)
    if "fit" not in found:
        return f"At the budget {budget.budget}, weft fit has no result for {report.model.name}."
    fit = found["fit"]
    tuned = fit.stage == "compress + tune"
    how = "weft fit and tuning" if tuned else "weft fit"
    head = f"At {round_percent(fit.share)} of its bfloat16 size, {report.model.name} by {how}"
    parts = [f"{head}: {number(fit.score.mean, digits)} {report.metric.unit}"]
    parts += [f"{NAMES[a]} {number(found[a].score.mean, digits)}" for a in ARMS[1:] if a in found]
    last = f"the original {number(report.original.score, digits)}"
    if tuned and report.original.tuned_score is not None:
        last += f" ({number(report.original.tuned_score, digits)} after the same tuning)"
    return "; ".join([*parts, last]) + "."


def judgements(report: Report, budget: Budget) -> list[tuple[str, str]]:
    """Fit against each uniform arm at the last stage: the verdict word and a sentence with the interval."""
    digits, found = places(report), final_rows(budget)
    made: list[tuple[str, str]] = []
    for arm in ARMS[1:]:
        gap = found[arm].versus_fit if arm in found else None
        if gap is None or "fit" not in found:
            continue
        word = verdict(gap)
        same = " Fit’s choice is this uniform one." if found[arm].choice == found["fit"].choice else ""
        interval = f"(95 % interval {span(gap, digits, signed=True)})"
        if word == "no detectable difference":
            text = f"No detectable difference to the {NAMES[arm]}: {number(gap.mean, digits, signed=True)} {interval}"
        else:
            side = "ahead of" if word == "fit ahead" else "behind"
            amount = f"{number(abs(gap.mean), digits)} {report.metric.unit}"
            text = f"Fit is {side} the {NAMES[arm]} by {amount} {interval}"
        made.append((word, f"{text}.{same}"))
    return made
