"""Add random parts of what tuning changed, scaled up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.votes import elected

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P186", paper="2311.03099", needs={"base"})
def dare(
    s: Sources,
    *,
    drop: Annotated[float, Field(ge=0, le=0.999, description="share of each task vector that is dropped")] = 0.9,
    then: Annotated[
        Literal["add", "ties"], Field(description="what is left is added, or its mean where signs agree (no trimming)")
    ] = "add",
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the result is added to the base")] = 0.4,
) -> Expr:
    """base + scale · Σ_k w_k z_k (member_k - base) / (1 - drop), z_k one with probability 1 - drop, else zero, entry by entry."""
    kept = (
        (w, d * (torch.rand(d.shape, generator=s.rng(f"dare {k}")) >= drop) / (1 - drop))
        for k, (w, d) in enumerate(zip(s.weights, s.deltas(), strict=True))
    )
    if then == "ties":
        return s.dense(s.start() + scale * elected(kept))
    value = s.start()
    for w, d in kept:
        value = value + scale * w * d
    return s.dense(value)


@dare.claim("keeps at least 90 % of what adding whole task vectors gains after 90 % of their entries were dropped")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("dare", {"drop": 0.9}), baseline=("task_arithmetic", {}), members="tasks", share=0.9)
