"""Context-aware prompt tuning: virtual tokens that begin as example texts and stay near them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model.context import Context

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", rows="P301", paper="2410.17222", needs={"text"})
def cpt(
    model: Trunk,
    *,
    length: Annotated[int, Field(ge=1, le=1024, description="virtual tokens: the first of the data")] = 16,
    radius: Annotated[
        float, Field(gt=0, le=1e3, description="how far one may go, in lengths of a mean token of the text")
    ] = 0.5,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Context:
    """Put the embeddings of example texts before the input, and train what is added to each within a ball. All weights stay frozen.

    v = e + d min(1, r / ||d||) for tokens e of `data`, d = 0 at first; r is `radius` times the mean of ||e||. The model starts as one
    that has read the examples. Without texts tokens are drawn, which is declared.
    Departures from the paper: the ball is part of the value, so that any optimizer stays in it, and not a projection after each step;
    it is the same for every token; the loss is that of what is trained on, without the examples' own labels.
    """
    start = model.embedded(model.examples(length, f"cpt {name}"))
    size = radius * float(start.norm(dim=1).mean())
    return Context(at=model.at, name=name, start=start, shift=nn.Parameter(torch.zeros_like(start)), radius=size)


@cpt.claim("begun as text of the task and held near it, gains more than as many free virtual tokens")
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").tune(ours=[("cpt", {"length": 64})], baseline=[("prompt", {"length": 64})], share=1.0)
