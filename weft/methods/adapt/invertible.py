"""Invertible adapters: trained coupling behind the embeddings, its inverse before the head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model import table_of
from weft.model.invertible import Invertible

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", rows="P281", paper="2005.00052")
def invertible(
    model: Trunk,
    *,
    width: Annotated[int, Field(ge=1, le=4096, description="features inside each half's network")] = 64,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Invertible:
    """Let tokens' embeddings through an invertible adapter A, and the last states through A⁻¹ before a head over the vocabulary.

    e = [e1, e2] becomes y1 = e1 + F(e2), y2 = e2 + G(y1); F and G are up relu(down x). up is zero at the start, so nothing changes; down is
    uniform in ±sqrt(3 / c) of c = d / 2. All weights stay frozen. A model without such a head has no inverse. MAD-X puts a
    `bottleneck` behind every feed-forward part too.
    Departures from the paper: A stands on the tokens' embeddings alone, before an encoder adds positions and types; where an encoder's
    head has a dense layer before the vocabulary, A⁻¹ stands before that; the paper's width is a quarter of d.
    """
    d = table_of(model.model, type(model.model).__name__, model.at, "invertible adapter").embedding_dim
    down = (torch.rand(2, width, d // 2, generator=model.rng(f"invertible {name}")) * 2 - 1) * math.sqrt(6 / d)
    headed = cast(Any, model.model).get_output_embeddings() is not None
    pair = {"down": nn.Parameter(down), "up": nn.Parameter(torch.zeros(2, d // 2, width))}
    return Invertible(at=model.at, name=name, back=headed, **pair)


@invertible.claim("with a bottleneck behind every feed-forward part gains more than that alone")
def claim(lab: Lab) -> Claim:
    one = ("bottleneck", {"form": "sequential", "scale": 1.0})
    return lab.tune(ours=[one, ("invertible", {})], baseline=[one], share=1.0)
