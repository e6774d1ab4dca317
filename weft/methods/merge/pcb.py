"""Add what tuning changed, weighed by how large it is and how well the members agree on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Sources, method
from weft.expr import Expr
from weft.linalg.votes import trimmed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P329", paper="2410.02396", needs={"base"})
def pcb(
    s: Sources,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of each task vector that is kept")] = 0.2,
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the merged task vector is added")] = 1.0,
) -> Expr:
    """base + scale · Σ_k w_k β_k d_k / Σ_k w_k β_k, d_k = member_k - base, over the entries that have one of the highest β_k.

    β_k = softmax(K u(d_k²)) Σ_j softmax(u(d_k d_j)) over the entries, u a map onto 0 to 1, for K members. Departures from the paper:
    entries compete within each weight, not over the whole model; members of other weights, those of zero not counted.
    """
    held = [(w, d) for w, d in zip(s.weights, s.deltas(), strict=True) if w]
    mass = added = torch.zeros(())
    for w, d in held:
        alone = _softmax(len(held) * _unit(d * d))
        score = w * trimmed(alone * sum(_softmax(_unit(d * other)) for _, other in held), density)
        mass, added = mass + score, added + score * d
    return s.dense(s.start() + scale * torch.where(mass > 0, added / mass, 0.0))


def _unit(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The entries moved to 0 to 1; zero where all are one number."""
    least, most = x.aminmax()
    return (x - least) / (most - least) if most > least else torch.zeros_like(x)


def _softmax(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The softmax over all entries, times their number, so that it can be told from zero."""
    return x.exp() / x.exp().mean()


@pcb.claim("merges members tuned on different tasks better than TIES does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("pcb", {}), baseline=("ties", {}), members="tasks")
