"""Add what tuning changed, where members agree on its sign."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from weft.engine import Each, Scope, Sources, method
from weft.expr import Expr
from weft.linalg.votes import agreed, drawn, elected, kept, limit, odds, summed, within

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2306.01708", needs={"base"})
def ties(
    s: Sources,
    *,
    density: Annotated[
        Each[Annotated[float, Field(gt=0, le=1)]],
        Field(description="share of each task vector that is kept, above 0; repeated: of each member's"),
    ] = 0.2,
    outliers: Annotated[
        Each[Annotated[float, Field(ge=0, lt=1)]],
        Field(description="share of the largest entries that is dropped first, from 0; repeated: of each member's"),
    ] = 0.0,
    spread: Annotated[
        Each[Annotated[float, Field(ge=0, le=1)]],
        Field(
            description="0: the largest are kept; to 1: drawn, the larger the more probably; repeated: of each member's"
        ),
    ] = 0.0,
    rescale: Annotated[
        Literal["odds", "size", "none"],
        Field(
            description="what is drawn is divided by its probability; or what is kept has the size of all; or neither"
        ),
    ] = "odds",
    then: Annotated[
        Literal["ties", "agree", "add"],
        Field(description="of what is kept, the mean where signs agree, the sum where they do, or all of it is added"),
    ] = "ties",
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
    scope: Annotated[
        Scope, Field(description="what the largest are chosen in: each weight, layer, or the model")
    ] = "weight",
) -> Expr:
    """base + scale · mean over the members with sign(d_k) = sign(Σ_k w_k d_k) of d_k, weighted by w_k, entry by entry.

    d_k are the largest entries of member_k - base. Departures from the paper: they are chosen within each weight, and over the whole
    model with scope=model; where both signs have the same mass, the base's entry stays. outliers, with then=add, is Breadcrumbs (arXiv
    2312.06795): of the largest entries, those that are far larger are left out too, and scale · Σ_k w_k d_k is added. spread is DELLA
    (arXiv 2406.11617): an entry is kept with a probability p that grows evenly with the rank of its size within its row, and divided by
    p; its ε is 2 · spread · min(density, 1 - density), so that p is in 0 to 1. rescale=size: times the factor, one a member and weight
    (or scope), that makes Σ|d_k| what it was before.
    """
    s = s.over(scope)
    own = list(zip(s.each(density), s.each(outliers), s.each(spread), strict=True))
    bounds = s.once("bounds", lambda: [_bounds(s, k, *one) for k, one in enumerate(own)])

    def left(k: int, part: Sources, d: Tensor) -> Tensor:
        share, _, wide = own[k]
        d = within(d, *bounds[k])
        return _thinned(d, share, wide, rescale == "odds", part.draws(f"ties {k}")) if wide else d

    times = s.once(
        "times", lambda: [s.growth(k, partial(left, k)) if rescale == "size" else 1.0 for k in range(len(own))]
    )

    def rows(part: Sources) -> Tensor:
        each = enumerate(zip(part.weights, times, part.deltas(), strict=True))
        votes = ((w, c * left(k, part, d)) for k, (w, c, d) in each)
        return part.start() + scale * {"ties": elected, "agree": agreed, "add": summed}[then](votes)

    return s.by_slices(rows)


def _thinned(d: Tensor, density: float, spread: float, divided: bool, draws: Tensor) -> Tensor:
    p = odds(d, density, spread)
    return drawn(d / p if divided else d, p, draws)


def _bounds(s: Sources, k: int, density: float, outliers: float, spread: float) -> tuple[float, float]:
    """The sizes from which, and up to which, entries of a task vector are kept; what draws them looks at all but outliers."""
    count = s.entries
    far = int(outliers * count)
    most = limit(lambda: s.deltas_of(k), far + 1) if far else math.inf
    above = sum(int((d.abs() > most).sum()) for d in s.deltas_of(k)) if far else 0
    rank = above + kept(density, count)
    return (0.0 if spread or rank > count else limit(lambda: s.deltas_of(k), rank)), most


@ties.claim("merges members tuned on different tasks better than averaging them does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("ties", {}), baseline=("soup", {}), members="tasks")


@ties.claim(
    "without its outliers and smallest entries, what is added merges better than all of it",
    of="breadcrumbs",
    paper="2312.06795",
)
def breadcrumbs(lab: Lab) -> Claim:
    ours = {"density": 0.15, "outliers": 0.01, "then": "add"}
    return lab.merge(ours=("ties", ours), baseline=("task_arithmetic", {"scale": 0.4}), members="tasks")


@ties.claim("entries drawn by their size merge better than entries drawn alike", of="della", paper="2406.11617")
def della(lab: Lab) -> Claim:
    ours = {"density": 0.1, "spread": 1.0, "then": "add", "scale": 0.4}
    return lab.merge(ours=("ties", ours), baseline=("dare", {"drop": 0.9}), members="tasks")
