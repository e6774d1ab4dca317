"""Add what tuning changed, as much in every direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.lowrank import isotropic
from weft.linalg.votes import summed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2502.04959", needs={"base"}, signed=True)
def iso_c(
    s: Sources,
    *,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the flattened sum is added")] = 4.0,
) -> Expr:
    """base + scale · σ U Vᵀ, U S Vᵀ = Σ_k w_k (member_k - base), σ the mean of S.

    No task's directions are stronger than another's. A vector, which has one direction, is task arithmetic. Departure from the paper:
    directions in which nothing changed, as of adapters, stay so and do not count in the mean.
    """
    return s.dense(s.start() + scale * isotropic(summed(zip(s.weights, s.deltas(), strict=True))))


@iso_c.claim("merges members tuned on different tasks better than adding all they learnt does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("iso_c", {}), baseline=("task_arithmetic", {}), members="tasks")
