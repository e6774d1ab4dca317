"""Remove whole attention heads: smaller plain matrices, with as many heads in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from weft.engine import Select, Span, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="transport", paper="2312.11983", needs={"gram"}, on=("heads",))
def heads(
    a: Span,
    *,
    keep: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of the heads that stay, rounded to whole ones",
            json_schema_extra={"better": "up"},
        ),
    ] = 0.75,
    by: Annotated[
        Literal["output", "weight"],
        Field(description="what a head brings to the output, or the size of its weights alone"),
    ] = "output",
) -> Select:
    """Keep the heads with the largest E||W_h x_h||² = tr(W_h E[x_h x_hᵀ] W_hᵀ), W_h the columns of the output projection that read head h.

    Where queries share keys and values, a head is those and all queries that they serve. The result is a plain model of the same
    class with fewer heads. Departure from the paper (FLAP): the fluctuation around the mean is not told from the mean, as
    most models have no bias to take it up, and every layer keeps as many.
    """
    size, unit = a.axis.size, a.axis.readers[0].unit
    weights = [s.now.dense().detach().double().view(-1, size, unit).movedim(1, 0) for s in a.readers]
    gram = a.readers.gram() if by == "output" else torch.eye(size * unit, dtype=torch.float64)
    own = gram.view(size, unit, size, unit).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [heads unit unit]
    score = torch.stack([((w @ own) * w).sum((1, 2)) for w in weights]).sum(0)
    count = max(1, round(keep * size))
    return Select(score.argsort(descending=True, stable=True)[:count].sort()[0])


@heads.claim("keeping three quarters of the heads by what they bring loses less than by the size of their weights")
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").compare(ours=[("heads", {})], baseline=[("heads", {"by": "weight"})])
