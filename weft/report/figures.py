"""The page's plots as plotly's own JSON. Colours are names in `meta`, which the page turns into those of its theme."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from weft.report import words
from weft.report.schema import Arm, Budget, Report, Row, SiteRow

Figure = dict[str, Any]

_COLOUR: dict[Arm, str] = {"fit": "fit", "uniform gptq": "gptq", "uniform rtn": "rtn"}
_SYMBOL: dict[Arm, str] = {"fit": "star", "uniform gptq": "circle", "uniform rtn": "square"}
_LABEL = 28
_DASH = ("solid", "dash", "dot", "dashdot", "longdash")


def pareto(report: Report) -> Figure:
    """Predicted loss of every uniform choice by its size, and what fit measured."""
    data: list[Figure] = []
    arms: dict[str, Arm] = {"rtn": "uniform rtn", "gptq": "uniform gptq"}
    for method, arm in arms.items():
        found = sorted((u for u in report.uniform if u.method == method), key=lambda u: (u.share, u.predicted))
        hover: list[str] = []
        for u in found:
            group = f"group {u.group}" if u.group else "one group a row"
            what = f"{method}, {u.bits} bits, {group}, {'symmetric' if u.symmetric else 'asymmetric'}"
            hover.append(f"{what}<br>{words.percent(u.share)} · predicted {words.brief(u.predicted)}")
        share, loss = [u.share for u in found], [u.predicted for u in found]
        data.append(_points(f"{arm}, predicted", arm, share, loss, hover))
    data.append(_fit_measured(report))
    title = f"{report.objective.name} ({report.objective.unit})"
    return _figure(data, "share of the bfloat16 bytes", title, log="y", xaxis={"tickformat": ".0%"})


def _fit_measured(report: Report) -> Figure:
    """What fit measured at each budget, before tuning; final checks of the uniform arms are not fit's."""
    share: list[float] = []
    loss: list[float] = []
    hover: list[str] = []
    for b in report.budgets:
        at = next((r.share for r in b.rows if r.arm == "fit" and r.stage == "compress"), None)
        for c in b.checks:
            if at is not None and c.kind == "final" and not c.label.startswith("uniform"):
                share.append(at)
                loss.append(c.measured)
                hover.append(f"{_check(b, c.label)}<br>{words.percent(at)} · measured {words.brief(c.measured)}")
    return _points("fit, measured", "fit", share, loss, hover, size=13)


def _check(budget: Budget, label: str) -> str:
    return f"{escape(label)}, budget {escape(budget.budget)}"


def scores(report: Report) -> Figure:
    """Scores with intervals by budget, the original as a line."""
    data: list[Figure] = []
    for arm in words.ARMS:
        for stage in words.STAGES:
            found = [(b, r) for b, r in words.rows(report) if r.arm == arm and r.stage == stage]
            earlier = any(words.final_stage(b) != stage for b, _ in found)
            if found:
                data.append(_score_trace(arm, found, earlier, words.places(report)))
    names = _ticks([b.budget for b in report.budgets])
    figure = _figure(data, "budget", f"{report.metric.name} ({report.metric.unit})", xaxis=names)
    was = report.original
    lines = [("original", was.score, "solid"), ("original, tuned", was.tuned_score, "dot")]
    drawn = sorted(((y, name, dash) for name, y, dash in lines if y is not None and math.isfinite(y)), reverse=True)
    paper = {"xref": "paper", "yref": "y"}
    figure["layout"]["yaxis"] |= _range([*(y for y, _, _ in drawn), *_ends(report)])
    figure["layout"] |= {
        "scattermode": "group",
        "scattergap": 0.5,
        "shapes": [
            {**paper, "type": "line", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": {"dash": dash, "width": 1.5}}
            for y, _, dash in drawn
        ],
        "annotations": [
            {**paper, "text": n, "x": 1, "xanchor": "right", "y": y, "yanchor": side, "showarrow": False}
            for (y, n, _), side in zip(drawn, ("bottom", "top"), strict=False)
        ],
    }
    return figure


def _ends(report: Report) -> list[float]:
    return [v for _, r in words.rows(report) for v in (r.score.low, r.score.mean, r.score.high)]


def _range(values: list[float]) -> Figure:
    """An axis range that holds the values with some air."""
    found = [v for v in values if math.isfinite(v)]
    if not found:
        return {}
    air = 0.08 * (max(found) - min(found)) or 0.05 * abs(found[0]) or 1.0
    return {"range": [min(found) - air, max(found) + air]}


def _score_trace(arm: Arm, found: list[tuple[Budget, Row]], earlier: bool, digits: int) -> Figure:
    name = f"{arm}, before tuning" if earlier else arm
    hover = [f"{_check(b, name)}<br>{escape(r.choice)}<br>{words.with_interval(r.score, digits)}" for b, r in found]
    mean, where = [r.score.mean for _, r in found], [escape(b.budget) for b, _ in found]
    trace = _points(name, arm, where, mean, hover, size=8 if earlier else 10)
    trace["marker"]["symbol"] += "-open" if earlier else ""
    trace["offsetgroup"] = name
    trace["error_y"] = {
        "type": "data",
        "symmetric": False,
        "array": [r.score.high - r.score.mean for _, r in found],
        "arrayminus": [r.score.mean - r.score.low for _, r in found],
        "thickness": 1.5,
        "width": 5,
    }
    return trace


def heat(budget: Budget) -> Figure:
    """Stored bits a weight by role and block, sites outside the blocks at the left."""
    roles = list(dict.fromkeys(s.role for s in budget.sites))
    blocks = sorted({s.block for s in budget.sites if s.block is not None})
    columns: list[int | None] = [*([None] if any(s.block is None for s in budget.sites) else []), *blocks]
    cells: dict[tuple[str, int | None], list[SiteRow]] = {}
    for s in budget.sites:
        cells.setdefault((s.role, s.block), []).append(s)
    grid = [[cells.get((role, block), []) for block in columns] for role in roles]
    bits = [[_bits(cell) for cell in row] for row in grid]
    trace = {
        "type": "heatmap",
        "x": ["other" if c is None else str(c) for c in columns],
        "y": [escape(r) for r in roles],
        "z": bits,
        "text": [["" if b is None else f"{b:.1f}" for b in row] for row in bits],
        "texttemplate": "%{text}",
        "hovertext": [["<br>".join(map(_site, cell)) for cell in row] for row in grid],
        "hoverinfo": "text",
        "hoverongaps": False,
        "colorscale": "Cividis",
        "xgap": 2,
        "ygap": 2,
        "colorbar": {
            "orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top", "len": 0.6,
            "thickness": 10, "outlinewidth": 0,
        },
    }  # fmt: skip
    plain = {"type": "category", "showgrid": False}
    figure = _figure([trace], "block", "", xaxis=plain, yaxis=plain | _ticks(roles) | {"autorange": "reversed"})
    figure["layout"] |= {"height": 110 + 30 * len(roles), "margin": {"l": 8, "r": 8, "t": 48, "b": 8}}
    return figure


def _bits(cell: list[SiteRow]) -> float | None:
    weights = sum(math.prod(s.shape) for s in cell)
    return sum(s.bits * math.prod(s.shape) for s in cell) / weights if weights else None


def _site(s: SiteRow) -> str:
    error = "" if s.error is None else f" · relative error {words.brief(s.error)}"
    return f"<b>{escape(s.name)}</b><br>{escape(s.expr)}<br>{words.brief(s.bits)} bits · {words.size(s.bytes)}{error}"


def checked(report: Report) -> Figure:
    """Measured against predicted loss of whole-model choices, by kind."""
    data: list[Figure] = []
    every = [(b, c) for b in report.budgets for c in b.checks]
    for kind, colour, symbol in (("uniform", "gptq", "circle"), ("final", "fit", "star")):
        found = [(b, c) for b, c in every if c.kind == kind]
        hover = [
            f"{_check(b, c.label)}<br>predicted {words.brief(c.predicted)} · measured {words.brief(c.measured)}"
            for b, c in found
        ]
        trace = _points(kind, "fit", [c.predicted for _, c in found], [c.measured for _, c in found], hover)
        data.append(trace | {"meta": colour, "marker": {"symbol": symbol, "size": 11 if kind == "final" else 9}})
    ends = [v for _, c in every for v in (c.predicted, c.measured) if 0 < v < math.inf]
    if ends:
        line = [min(ends) / 1.3, max(ends) * 1.3]
        diagonal = _line("equal", line, line, "muted", dash="dot")
        data.insert(0, diagonal | {"hoverinfo": "skip"})
    unit = report.objective.unit
    return _figure(data, f"predicted loss ({unit})", f"measured loss ({unit})", log="xy")


def curves(budget: Budget) -> Figure | None:
    """Tuning loss by step, a line for every arm and seed."""
    if not budget.curves:
        return None
    data: list[Figure] = []
    seeds = sorted({c.seed for c in budget.curves})
    for arm in words.ARMS:
        for i, c in enumerate(sorted((c for c in budget.curves if c.arm == arm), key=lambda c: c.seed)):
            pairs = list(zip(c.step, c.loss, strict=False))
            trace = _line(arm, c.step, c.loss, _COLOUR[arm], dash=_DASH[seeds.index(c.seed) % len(_DASH)])
            hover = [f"{arm}, seed {c.seed}<br>step {s} · {words.brief(v)}" for s, v in pairs]
            trace |= {"hovertext": hover, "hoverinfo": "text"}
            data.append(trace | {"legendgroup": arm, "showlegend": i == 0})
    return _figure(data, "step", "training loss")


def escape(text: str) -> str:
    """Text that plotly shows as it is, without tags or entities of its own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _log(values: list[float]) -> Figure:
    """A logarithmic axis: powers of ten, with 2 and 5 between if there are few."""
    drawn = [v for v in values if 0 < v < math.inf]
    wide = bool(drawn) and max(drawn) > 50 * min(drawn)
    return {"type": "log", "tickformat": "~g", "dtick": 1 if wide else "D2"}


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _ticks(names: list[str]) -> Figure:
    """A category axis whose labels stay short."""
    labels = [escape(_clip(n, _LABEL)) for n in names]
    return {"type": "category", "tickvals": [escape(n) for n in names], "ticktext": labels}


def undrawn(values: Iterable[float]) -> int:
    """How many values a log axis cannot show."""
    return sum(not 0 < v < math.inf for v in values)


def finite(value: Any) -> Any:
    """The same figure with null for every number that is not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(name: str, x: list[Any], y: list[float], colour: str, *, dash: str) -> Figure:
    style = {"width": 1.8, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "meta": colour, "line": style}


def _points(name: str, arm: Arm, x: list[Any], y: list[float], hover: list[str], *, size: int = 8) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "hovertext": hover,
        "hoverinfo": "text",
        "meta": _COLOUR[arm],
        "marker": {"symbol": _SYMBOL[arm], "size": size},
    }


def _figure(data: list[Figure], x: str, y: str, *, log: str = "", **axes: Figure) -> Figure:
    def axis(name: str, title: str) -> Figure:
        power = _log([v for trace in data for v in trace[name]]) if name in log else {}
        label = {"text": escape(_clip(title, 60)), "standoff": 8}
        return {"title": label, "automargin": True, "zeroline": False, **power}

    return {
        "data": data,
        "layout": {
            "height": 420,
            "margin": {"l": 8, "r": 8, "t": 20, "b": 8},
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": axis("x", x) | axes.get("xaxis", {}),
            "yaxis": axis("y", y) | axes.get("yaxis", {}),
        },
    }
