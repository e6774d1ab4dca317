"""Add random parts of what tuning changed, scaled up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import Asks, Each, Sources, method
from weft.expr import Expr
from weft.linalg.votes import agreed, as_large, elected, summed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P186 P221", paper="2311.03099", needs={"base"})
def dare(
    s: Sources,
    *,
    drop: Annotated[
        Each[Annotated[float, Field(ge=0, le=0.999)]],
        Field(description="share of each task vector that is dropped, 0 to 0.999; repeated: of each member's"),
    ] = 0.9,
    then: Annotated[
        Literal["add", "ties", "agree"],
        Field(
            description="what is left is added, or its mean where signs agree (no trimming), or its sum where they do"
        ),
    ] = "add",
    rescale: Annotated[
        Literal["share", "outputs", "size", "none"],
        Asks("gram", frozenset({"outputs"})),
        Field(
            description="what is kept is divided by 1 - drop, or by what changes outputs least, or scaled to the size of all, or not"
        ),
    ] = "share",
    scale: Annotated[float, Field(ge=-10, le=10, description="how much of the result is added to the base")] = 0.4,
) -> Expr:
    """base + scale · Σ_k w_k z_k d_k / q_k, d_k = member_k - base, z_k one with probability 1 - drop, else zero, entry by entry.

    q_k is 1 - drop. rescale=outputs is DAREx-q (arXiv 2410.09344): on data without labels, a q for every weight, here in closed form,
    1/q = tr(d G (z d)ᵀ) / tr(z d G (z d)ᵀ), G = E[x xᵀ] of the member's inputs; vectors and embeddings have 1 - drop.
    rescale=size: 1/q = Σ|d| / Σ|z d|.
    """

    def kept() -> Iterator[tuple[float, Tensor]]:
        for k, (w, d, p) in enumerate(zip(s.weights, s.deltas(), s.each(drop), strict=True)):
            part = d * (torch.rand(d.shape, generator=s.rng(f"dare {k}")) >= p)
            gram = s.grams[k] if rescale == "outputs" and s.grams else None
            read = part @ gram.to(part.dtype) if gram is not None else torch.zeros(())
            if rescale == "size":
                part = as_large(part, d)
            elif (size := float((read * part).sum())) > 0:
                part = part * (float((read * d).sum()) / size)
            elif rescale != "none":
                part = part / (1 - p)
            yield w, part

    return s.dense(s.start() + scale * {"add": summed, "ties": elected, "agree": agreed}[then](kept()))


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
