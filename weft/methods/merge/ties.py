"""Add what tuning changed, where members agree on its sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.votes import elected, trimmed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2306.01708", needs={"base"})
def ties(
    s: Sources,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of each task vector that is kept")] = 0.2,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
) -> Expr:
    """base + scale · mean over the members with sign(d_k) = sign(Σ_k w_k d_k) of d_k, weighted by w_k, entry by entry.

    d_k are the largest entries of member_k - base. Departures from the paper: they are chosen within each weight, not over the
    whole model; where both signs have the same mass, the base's entry stays.
    """
    votes = ((w, trimmed(d, density)) for w, d in zip(s.weights, s.deltas(), strict=True))
    return s.dense(s.start() + scale * elected(votes))


@ties.claim("merges members tuned on different tasks better than averaging them does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("ties", {}), baseline=("soup", {}), members="tasks")
