"""Realism cards: whether a lab model is like real ones where methods differ, so that a claim tried on it counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from weft.engine.run import Chain, Step, run
from weft.error import ConflictError
from weft.expr import Dense
from weft.lab.bootstrap import Interval, interval
from weft.lab.inputs import Inputs, kurtosis, powers
from weft.lab.metrics import Scores
from weft.model import Group, expressions, fingerprint, fork, match, set_expressions, site
from weft.stats import Walker

KURTOSIS = 4.0
"""Inputs are at least this heavy-tailed at the median site; Gaussian ones have 3."""
OUTLIER = 50.0
"""At some site the largest feature has at least this many times the median feature's second moment."""
RANK = (0.05, 0.5)
"""Effective rank of the median site's inputs, as a share of their width: neither collapsed nor isotropic."""


@dataclass(frozen=True)
class Specimen:
    """A lab model, inputs to watch it on, and what held-out items score, less being better."""

    name: str
    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    score: Callable[[nn.Module], Scores]
    metric: str
    stress: bool = False
    """Made to be hard: no claim counts on it."""


def card(of: Specimen) -> dict[str, Any]:
    """What was measured of this lab model, what is asked of it, and whether all of it passes, which a stress variant never does."""
    inputs = Inputs(of.model, of.batches)
    sites = [n for n in match(of.model, "all-linear") if inputs.of.get(n) in inputs.tails]
    rows = {edge: _row(of.model, inputs, edge, sites) for edge in dict.fromkeys(inputs.of[n] for n in sites)}
    seen = {k: np.array([r[k] for r in rows.values()]) for k in next(iter(rows.values()))}
    losses = _losses(of, inputs, sites)
    checks = {
        "kurtosis of inputs, median": _check(float(np.median(seen["kurtosis"])), low=KURTOSIS),
        "largest over median feature second moment, any input": _check(float(seen["outlier"].max()), low=OUTLIER),
        "effective rank of inputs over their width, median": _check(float(np.median(seen["rank"])), *RANK),
        "loss by gptq less that by rtn, at 3 bits": _sign(losses["gptq less rtn at 3 bits"], below=True),
        "curvature along the noise of rtn at 4 bits": _sign(losses["curvature at 4 bits"], below=False),
    }
    return {
        "fingerprint": fingerprint(of.model),
        "stress": of.stress,
        "checks": checks,
        "pass": all(c["pass"] for c in checks.values()) and not of.stress,
        "walked": walked(of),
        "metric": of.metric,
        "loss": {k: _four(v.as_json()) for k, v in losses.items()},
        "inputs": {edge: _four(r) for edge, r in rows.items()},
    }


def walked(of: Specimen) -> bool | str:
    """Whether evidence can be taken a block at a time, or why not."""
    try:
        Walker(of.model, of.batches[:1])
    except ConflictError as e:
        return f"{e.what}: {e.got}"
    return True


def _row(model: nn.Module, inputs: Inputs, edge: str, sites: Sequence[str]) -> dict[str, float]:
    """One input: its tails, its rank, and the tails of the weights that read it."""
    tails, exprs = inputs.tails[edge], expressions(model)
    weights = [powers(exprs[n].dense().detach()) for n in sites if inputs.of[n] == edge]
    return {
        "kurtosis": kurtosis(tails.powers),
        "outlier": tails.outlier,
        "rank": tails.rank,
        "kurtosis of weights": max(map(kurtosis, weights)),
    }


def _losses(of: Specimen, inputs: Inputs, sites: Sequence[str]) -> dict[str, Interval]:
    """What roundings cost, in the metric: L(w + e) - L(w) = slope + curvature / 2, where e is the noise of 4 bits.

    slope = (L(w + e) - L(w - e)) / 2, curvature = L(w + e) + L(w - e) - 2 L(w).
    """
    rtn, gptq, noise = (_rounded(of.model, inputs, sites, n, b) for n, b in (("rtn", 3), ("gptq", 3), ("rtn", 4)))
    plain = {n: e.dense().detach().float() for n, e in expressions(of.model).items() if n in set(sites)}
    back = {n: 2 * plain[n] - w for n, w in noise.items()}
    (base, weights), *others = (of.score(_with(of.model, w)) for w in (plain, rtn, gptq, noise, back))
    by_rtn, by_gptq, ahead, behind = (values - base for values, _ in others)
    differences: dict[str, Float[np.ndarray, " k"]] = {
        "score": base,
        "rtn at 3 bits": by_rtn,
        "gptq at 3 bits": by_gptq,
        "gptq less rtn at 3 bits": by_gptq - by_rtn,
        "slope at 4 bits": (ahead - behind) / 2,
        "curvature at 4 bits": ahead + behind,
    }
    return {k: interval(v[None], weights[None]) for k, v in differences.items()}


def _rounded(model: nn.Module, inputs: Inputs, sites: Sequence[str], method: str, bits: int) -> dict[str, Tensor]:
    """The values of these sites after a rounding, all from the evidence of the plain model."""
    chain: Chain = (Step.of(method, bits=bits),)
    made: dict[str, Tensor] = {}
    for names in inputs.groups():
        if here := [n for n in names if n in set(sites)]:
            group = Group(tuple(site(model, n, evidence=(e,)) for n, e in inputs.evidence(here).items()))
            made |= {n: e.dense().float() for n, e in zip(here, run(group, chain), strict=True)}
    return made


def _with(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A fork with these values."""
    made = fork(model)
    set_expressions(made, {n: Dense(v) for n, v in values.items()})
    return made


def _check(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    good = (low is None or value >= low) and (high is None or value <= high)
    return {"value": float(f"{value:.4g}"), "at_least": low, "at_most": high, "pass": good}


def _sign(seen: Interval, *, below: bool) -> dict[str, Any]:
    """Whether all of the interval is below zero, or above it."""
    held = _check(seen.mean, high=0.0) if below else _check(seen.mean, low=0.0)
    return {**held, "pass": seen.high < 0 if below else seen.low > 0}


def _four(values: Mapping[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.4g}") for k, v in values.items()}
