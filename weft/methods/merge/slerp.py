"""Go along the arc between two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import Scope, Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P093", members=2)
def slerp(
    s: Sources,
    *,
    straight: Annotated[
        float, Field(ge=1e-6, le=0.1, description="angle in radians below which the straight line is taken")
    ] = 1e-6,
    scope: Annotated[
        Scope, Field(description="what the angle is measured over: each weight, each layer, or the model")
    ] = "weight",
) -> Expr:
    """sin((1 - t) Ω) / sin Ω · first + sin(t Ω) / sin Ω · second, Ω the angle between the two as vectors, t = w_2 / (w_1 + w_2).

    For weights in one direction that is the straight line. Between opposite ones, and to zero, there is no arc: the straight line
    is taken, which is declared.
    """
    s = s.over(scope)
    t, (xx, xy, yy) = s.shares()[1], s.once("products", lambda: _products(s))
    size = math.sqrt(xx) * math.sqrt(yy)
    angle = math.acos(max(-1.0, min(1.0, xy / size))) if size else 0.0
    arc = straight < angle < math.pi - max(straight, 1e-3)
    if not arc and 0 < t < 1 and (angle > 1 or (not size and xx + yy)):
        s.fallback("there is no arc between opposite or zero weights: the straight line was taken")
    a, b = (math.sin(share * angle) / math.sin(angle) if arc else share for share in (1 - t, t))

    def rows(part: Sources) -> Tensor:
        x, y = part.copies()
        return x.mul_(a).add_(y, alpha=b) if arc else x.lerp_(y, b)

    return s.by_slices(rows, light=True)


def _products(s: Sources) -> tuple[float, float, float]:
    """x · x, x · y and y · y of the two."""
    xx = xy = yy = 0.0
    x, y = (torch.empty(0, dtype=torch.float64) for _ in range(2))
    for part in s.across():
        for held, e in zip((x, y), part.members, strict=True):
            held.resize_(math.prod(part.shape)).copy_(e.dense().detach().flatten())
        xx, xy, yy = xx + float(x @ x), xy + float(x @ y), yy + float(y @ y)
    return xx, xy, yy


@slerp.claim(
    "half way on the arc between members tuned on different tasks serves these tasks better than averaging them does"
)
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("slerp", {}), baseline=("soup", {}), members="tasks", count=2)


@slerp.claim(
    "an embedding model half way between one tuned on names and one tuned on texts serves both better than either",
    of="fusion",
    paper="2410.05770",
)
def fusion(lab: Lab) -> Claim:
    return lab.merge(ours=("slerp", {}), baseline="best", members="views")
