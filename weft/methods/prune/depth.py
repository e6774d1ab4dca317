"""Remove whole blocks: a shallower plain model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from weft.engine import Tower, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="cut", paper="2403.03853", needs={"influence"})
def depth(
    t: Tower,
    *,
    share: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the blocks that go, rounded to whole ones; one stays",
            json_schema_extra={"better": "down"},
        ),
    ] = 0.25,
    by: Annotated[
        Literal["influence", "last"], Field(description="those that change the hidden state least, or the last ones")
    ] = "influence",
) -> list[int]:
    """Drop the blocks with the least influence 1 - E[cos(x_i, x_{i+1})], x_i a token's hidden state before block i.

    All are chosen at once, from the whole model. The result is a plain model of the same class with fewer blocks.
    """
    score = t.influence if by == "influence" else -torch.arange(len(t)).double()
    asked = share * len(t)
    count = min(len(t) - 1, round(asked))
    if count < round(asked) or (share and not count):
        t.fallback(f"{count} of {len(t)} blocks go, where {asked:.2f} were asked for")
    return score.argsort(stable=True)[:count].tolist()


@depth.claim("dropping a quarter of the blocks by their influence loses less than dropping the last ones")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("depth", {})], baseline=[("depth", {"by": "last"})])
