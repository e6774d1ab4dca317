"""The report as one offline page."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weft.error import FormatError, PathError, ResourceError, WeftError, raise_all
from weft.report import figures, words
from weft.report.schema import Report
from weft.store.files import parse_json


def read(path: Path) -> Report:
    """A report.json. Errors: PathError if it cannot be read, FormatError with every problem found in it."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        fix, got = "check the path, or run `weft fit` first", e.strerror
        raise PathError("a report cannot be read", where=str(path), got=got, want="a report.json", fix=fix) from None
    parse_json(raw, path.name)
    try:
        return Report.model_validate_json(raw, strict=True)
    except ValidationError as e:
        problems: list[WeftError] = []
        for found in e.errors(include_url=False):
            at = ".".join(map(str, found["loc"])) or "(whole file)"
            where, fix = f"{path.name}: {at}", "run `weft fit` again with this version of weft"
            wrong = FormatError("a report is not valid", where=where, got=found["input"], want=found["msg"], fix=fix)
            problems.append(wrong)
        raise_all(problems[:20])
        raise


def render(report: Report) -> str:
    """One HTML file that needs nothing else; the same report gives the same bytes."""
    environment, plotly = _extras()
    folder = resources.files("weft.report")
    script = folder.joinpath("page.js").read_text("utf8")
    template = environment.from_string(folder.joinpath("page.html").read_text("utf8"))
    plots = {name: figures.finite(figure) for name, figure in _plots(report).items()}
    return template.render(
        report=report,
        words=words,
        digits=words.places(report),
        plots=plots,
        undrawn=_undrawn(report),
        plotly=plotly,
        script=script,
        hashes=[_hash(plotly), _hash(script)],
    )


def _plots(report: Report) -> dict[str, figures.Figure]:
    """Every plot by the id of its place in the page."""
    made = {"pareto": figures.pareto(report), "scores": figures.scores(report), "checked": figures.checked(report)}
    for i, budget in enumerate(report.budgets):
        if budget.sites:
            made[f"heat-{i}"] = figures.heat(budget)
        if curve := figures.curves(budget):
            made[f"curves-{i}"] = curve
    return made


def _undrawn(report: Report) -> dict[str, int]:
    """How many points each log plot leaves out."""
    checks = [c for b in report.budgets for c in b.checks]
    return {
        "pareto": figures.undrawn(u.predicted for u in report.uniform),
        "checked": sum(figures.undrawn([c.predicted, c.measured]) > 0 for c in checks),
    }


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _extras() -> tuple[Any, str]:
    """The template environment and plotly's script. Errors: ResourceError if one is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as e:
        fix, want = 'pip install "weft[report]"', "plotly and jinja2"
        raise ResourceError("a package is missing", where="report page", got=e.name, want=want, fix=fix) from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment, str(get_plotlyjs()).replace("\r\n", "\n")
