"""Go from the base towards the members' mean, as far as they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Scope, Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2403.19522", needs={"base"})
def model_stock(
    s: Sources,
    *,
    opposed: Annotated[
        Literal["base", "away"],
        Field(description="task vectors that point apart: the base stays, or as far away as the formula says"),
    ] = "base",
    scope: Annotated[
        Scope, Field(description="what t is measured over: each weight, each layer, or the model")
    ] = "weight",
) -> Expr:
    """base + t Σ_k a_k d_k, d_k = member_k - base, a_k = w_k / Σ_j w_j, t = c / (A + (1 - A) c), A = Σ_k a_k².

    c is the mean cosine of the angle between d_j and d_k over pairs, weighted by a_j a_k; a d of zero is at right angles to all. For K
    equal weights t = K c / (1 + (K - 1) c), as in the paper. Departures: members of other weights; c below zero counts as zero, the base,
    but with opposed=away.
    """
    s = s.over(scope)
    shares = s.shares()
    sizes = s.once("sizes", lambda: _sizes(s))
    units = [a / size if size else 0.0 for a, size in zip(shares, sizes, strict=True)]
    together = s.once("together", lambda: sum(float(_sum(units, part).square().sum()) for part in s.across()))
    alike, t = math.fsum(a * a for a in shares), 1.0
    if alike < 1:
        c = (together - math.fsum((u * size) ** 2 for u, size in zip(units, sizes, strict=True))) / (1 - alike)
        c = c if opposed == "away" else max(0.0, c)
        whole = alike + (1 - alike) * c
        t = c / whole if abs(whole) > 1e-6 else 0.0
    return s.added([t * a for a in shares])


def _sizes(s: Sources) -> list[float]:
    """|d_k| of every member."""
    return [math.sqrt(sum(float(d.double().square().sum()) for d in s.deltas_of(k))) for k in range(len(s.members))]


def _sum(units: Sequence[float], part: Sources) -> Float[Tensor, "m n"]:
    return sum((u * d.double() for u, d in zip(units, part.deltas(), strict=True)), torch.zeros(()))


@model_stock.claim("members tuned alike but for their seed merge better towards the base than in their mean")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("model_stock", {}), baseline=("soup", {}), members="seeds", count=2)
