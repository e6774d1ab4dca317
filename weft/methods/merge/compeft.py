"""What tuning changed, in signs of its largest entries and one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr, Signs, fork, total
from weft.linalg.votes import trimmed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P018", paper="2311.13171", needs={"base"}, signed=True, adds=True)
def compeft(
    s: Sources,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of each task vector that is kept")] = 0.2,
    scale: Annotated[
        float, Field(ge=-10, le=10, description="what is kept has this size, in standard deviations of the task vector")
    ] = 3.0,
) -> Expr:
    """base + Σ_k w_k · scale · std(d_k) · sign(d_k) at the largest |d_k|, d_k = member_k - base.

    The base keeps its expression; each member is a sparse term of one size beside it, whose places and signs take about nine bits an entry.
    Departure from the paper, which codes places by Golomb's code: gaps are bytes. The largest entries are chosen within each weight.
    """
    members = {
        f"adapter:member-{k}": Signs.of(trimmed(d, density).sign(), w * scale * d.std(correction=0))
        for k, (w, d) in enumerate(zip(s.weights, s.deltas(), strict=True), 1)
    }
    return total({"base": fork(s.origin), **members})


@compeft.claim("keeps at least 90 % of what a member gains in a sixteenth of the bytes of its task vector in float32")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("compeft", {}), baseline="mean", members="tasks", share=0.9, count=1)
