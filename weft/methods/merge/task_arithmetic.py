"""Add what tuning changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P011", paper="2212.04089", needs={"base"}, signed=True)
def task_arithmetic(
    s: Sources,
    *,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the sum of task vectors is added")] = 0.4,
) -> Expr:
    """base + scale · Σ_k w_k (member_k - base); a negative weight takes away what a member learnt.

    Terms that base and members share stay as they are, and low-rank and sparse ones are added as such.
    """
    return s.added([scale * w for w in s.weights])


@task_arithmetic.claim(
    "adding what members learnt on different tasks serves these tasks better than the mean member does"
)
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("task_arithmetic", {}), baseline="mean", members="tasks")


@task_arithmetic.claim(
    "half way from the base to a member, prompts that are noisier than those it was tuned on gain more if its labels were smoothed",
    of="bang",
    paper="2309.17230",
)
def bang(lab: Lab) -> Claim:
    half = ("task_arithmetic", {"scale": 0.5})
    return lab.merge(ours=half, baseline=half, members="tasks", count=1, smoothing=0.1, noisy=True)
