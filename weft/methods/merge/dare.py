"""Add random parts of what tuning changed, scaled up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from weft.engine import Asks, Each, Sources, method
from weft.expr import Expr
from weft.linalg.votes import agreed, elected, summed

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

    drops = s.each(drop)

    def left(k: int, part: Sources, d: Tensor) -> Tensor:
        return d * part.draws(f"dare {k}").ge_(drops[k])

    def factor(k: int) -> float:
        if rescale == "size":
            return s.growth(k, partial(left, k))
        by_outputs = _factor(s, k, partial(left, k)) if rescale == "outputs" else None
        return by_outputs or (1.0 if rescale == "none" else 1 / (1 - drops[k]))

    times = [factor(k) for k in range(len(drops))]

    def rows(part: Sources) -> Tensor:
        votes = (
            (w, c * left(k, part, d))
            for k, (w, c, d) in enumerate(zip(part.weights, times, part.deltas(), strict=True))
        )
        return part.start() + scale * {"add": summed, "ties": elected, "agree": agreed}[then](votes)

    return s.by_slices(rows)


def _factor(s: Sources, k: int, left: Callable[[Sources, Tensor], Tensor]) -> float | None:
    """1/q_k by what the weight reads; None where that is not known."""
    gram = s.grams[k] if s.grams else None
    if gram is None:
        return None
    whole, size = 0.0, 0.0
    for part, d in zip(s.slices(), s.deltas_of(k), strict=True):
        kept = left(part, d)
        read = kept @ gram.to(kept.dtype)
        whole, size = whole + float((read * d).sum()), size + float((read * kept).sum())
    return whole / size if size > 0 else None


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
