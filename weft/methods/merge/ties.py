"""Add what tuning changed, where members agree on its sign."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.votes import drawn, elected, kept, limit, summed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2306.01708", needs={"base"})
def ties(
    s: Sources,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of each task vector that is kept")] = 0.2,
    outliers: Annotated[
        float, Field(ge=0, lt=1, description="share of the largest entries that is dropped first")
    ] = 0.0,
    spread: Annotated[
        float,
        Field(
            ge=0, le=1, description="0: the largest are kept; else they are drawn, the larger the more probably by this"
        ),
    ] = 0.0,
    then: Annotated[
        Literal["ties", "add"], Field(description="of what is kept, the mean where signs agree, or all of it is added")
    ] = "ties",
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
) -> Expr:
    """base + scale · mean over the members with sign(d_k) = sign(Σ_k w_k d_k) of d_k, weighted by w_k, entry by entry.

    d_k are the largest entries of member_k - base. Departures from the paper: they are chosen within each weight, not over the
    whole model; where both signs have the same mass, the base's entry stays.
    outliers, with then=add, is Breadcrumbs (arXiv 2312.06795): of the largest entries, those that are far larger are left out too, and
    scale · Σ_k w_k d_k is added. spread is DELLA (arXiv 2406.11617): an entry is kept with a probability p that grows evenly with the
    rank of its size within its row, and divided by p; its ε is 2 · spread · min(density, 1 - density), so that p is in 0 to 1.
    """

    bounds = [_bounds(s, k, density, outliers, bool(spread)) for k in range(len(s.members))]

    def rows(part: Sources) -> Tensor:
        return part.start() + scale * (elected if then == "ties" else summed)(votes(part))

    def votes(part: Sources) -> Iterator[tuple[float, Tensor]]:
        for k, (w, d) in enumerate(zip(part.weights, part.deltas(), strict=True)):
            least, most = bounds[k]
            size = d.abs()
            d = d * ((size >= least) & (size <= most))
            yield w, drawn(d, density, spread, part.rng(f"ties {k}")) if spread else d

    return s.by_slices(rows)


def _bounds(s: Sources, k: int, density: float, outliers: float, draws: bool) -> tuple[float, float]:
    """The sizes from which, and up to which, entries of a task vector are kept; what draws them looks at all but outliers."""
    count = s.shape[0] * s.shape[1]
    far = int(outliers * count)
    most = limit(lambda: s.deltas_of(k), far + 1) if far else math.inf
    above = sum(int((d.abs() > most).sum()) for d in s.deltas_of(k)) if far else 0
    rank = above + kept(density, count)
    return (0.0 if draws or rank > count else limit(lambda: s.deltas_of(k), rank)), most


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
