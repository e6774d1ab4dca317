"""Add random parts of what tuning changed, scaled up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import Asks, Sources, method
from weft.expr import Expr
from weft.linalg.votes import elected, summed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P186 P221", paper="2311.03099", needs={"base"})
def dare(
    s: Sources,
    *,
    drop: Annotated[float, Field(ge=0, le=0.999, description="share of each task vector that is dropped")] = 0.9,
    then: Annotated[
        Literal["add", "ties"], Field(description="what is left is added, or its mean where signs agree (no trimming)")
    ] = "add",
    rescale: Annotated[
        Literal["share", "outputs"],
        Asks("gram", frozenset({"outputs"})),
        Field(description="what is kept is divided by 1 - drop, or by what changes a layer's outputs least"),
    ] = "share",
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the result is added to the base")] = 0.4,
) -> Expr:
    """base + scale · Σ_k w_k z_k d_k / q_k, d_k = member_k - base, z_k one with probability 1 - drop, else zero, entry by entry.

    q_k is 1 - drop. rescale=outputs is DAREx-q (arXiv 2410.09344): on data without labels, a q for every weight, here in closed form,
    1/q = tr(d G (z d)ᵀ) / tr(z d G (z d)ᵀ), G = E[x xᵀ] of the member's inputs; vectors and embeddings have 1 - drop.
    """

    times = [_factor(s, k, drop) if rescale == "outputs" else 1 / (1 - drop) for k in range(len(s.members))]

    def rows(part: Sources) -> Tensor:
        votes = ((w, c * d) for w, c, d in zip(part.weights, times, _thinned(part, drop), strict=True))
        return part.start() + scale * (elected if then == "ties" else summed)(votes)

    return s.by_slices(rows)


def _thinned(s: Sources, drop: float) -> Iterator[Tensor]:
    """z_k d_k."""
    return (d * (torch.rand(d.shape, generator=s.rng(f"dare {k}")) >= drop) for k, d in enumerate(s.deltas()))


def _factor(s: Sources, k: int, drop: float) -> float:
    """1/q_k by what the weight reads."""
    gram = s.grams[k] if s.grams else None
    if gram is None:
        return 1 / (1 - drop)
    whole, size = 0.0, 0.0
    for part, d in zip(s.slices(), s.deltas_of(k), strict=True):
        left = d * (torch.rand(d.shape, generator=part.rng(f"dare {k}")) >= drop)
        read = left @ gram.to(left.dtype)
        whole, size = whole + float((read * d).sum()), size + float((read * left).sum())
    return whole / size if size > 0 else 1 / (1 - drop)


@dare.claim("keeps at least 90 % of what adding whole task vectors gains after 90 % of their entries were dropped")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("dare", {"drop": 0.9}), baseline=("task_arithmetic", {}), members="tasks", share=0.9)


@dare.claim(
    "of one member, divided by what suits the outputs, gains more than divided by 1 - drop after 99.9 % were dropped",
    of="darex",
    paper="2410.09344",
)
def darex(lab: Lab) -> Claim:
    plain = {"drop": 0.999, "scale": 1.0}
    ours = ("dare", {**plain, "rescale": "outputs"})
    return lab.merge(ours=ours, baseline=("dare", plain), members="tasks", count=1)
