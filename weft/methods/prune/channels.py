"""Remove whole inner features: smaller plain matrices, of the same size in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from weft.engine import Select, Span, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="transport", paper="2312.11983", needs={"gram"}, on=("feed",))
def channels(
    a: Span,
    *,
    keep: Annotated[
        float, Field(gt=0, le=1, description="share of the features that stay", json_schema_extra={"better": "up"})
    ] = 0.75,
    by: Annotated[
        Literal["output", "weight"],
        Field(description="what a feature brings to the output, or the size of its weights alone"),
    ] = "output",
) -> Select:
    """Keep the features of a feed-forward part with the largest E[x_j²] Σ_i w_ij², w the weights that read them.

    The result is a plain model of the same class with a smaller width. Departure from the paper (FLAP): the fluctuation around the
    mean is not told from the mean, as most models have no bias to take it up, and every layer keeps as many.
    """
    size = torch.stack([s.now.dense().detach().double().square().sum(0) for s in a.readers]).sum(0)
    score = size * a.readers.second_moment() if by == "output" else size
    count = max(1, round(keep * a.axis.size))
    return Select(score.argsort(descending=True, stable=True)[:count].sort()[0])


@channels.claim(
    "keeping three quarters of the features by what they bring loses less than by the size of their weights"
)
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").compare(ours=[("channels", {})], baseline=[("channels", {"by": "weight"})])
