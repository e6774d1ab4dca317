"""Low-rank updates that a context generates in one forward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model.bottleneck import Position, width_of
from weft.model.recall import Recall, recall_hosts

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", rows="P350", paper="2411.05877")
def generative(
    model: Trunk,
    *,
    rank: Annotated[int, Field(ge=1, le=1024, description="rank of what is generated")] = 16,
    window: Annotated[int, Field(ge=1, le=65536, description="tokens that the model reads at once")] = 128,
    position: Annotated[Position, Field(description="the parts that are updated")] = "both",
    scale: Annotated[float, Field(gt=0, le=1e3, description="what an update is multiplied by")] = 1.0,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Recall:
    """Let the model read a text in segments of `window` tokens, each alone, its parts updated by s B O(S) A of all earlier segments.

    S = Σ (K x)(V x)ᵀ over their tokens, x what the part reads in the frozen model; O(S) is about U Wᵀ of S = U D Wᵀ. A, B, K and V are
    what trains, on texts longer than the window; the loss of what follows a context is the paper's of continuing it. B is zero at the
    start, so that segments are read as if they stood alone.
    Departures from the paper: updates go beside whole parts rather than single projections, O is a Newton-Schulz iteration rather than
    a decomposition, x is normalized, and no loss asks for the context itself.
    """
    d, parts = width_of(model.model), recall_hosts(model.model, position)

    def drawn(word: str) -> nn.Parameter:
        shaken = torch.rand(len(parts), rank, d, generator=model.rng(f"generative {name} {word}")) * 2 - 1
        return nn.Parameter(shaken * math.sqrt(3 / d))

    within = len(f"{model.at}.") if model.at else 0
    return Recall(
        at=model.at, name=name, window=window, scale=scale, parts=" ".join(p[within:] for p in parts),
        keys=drawn("keys"), values=drawn("values"), down=drawn("down"), up=nn.Parameter(torch.zeros(len(parts), d, rank)),
    )  # fmt: skip


@generative.claim("what a context generated makes tokens behind the window likelier than LoRA that took the same steps")
def claim(lab: Lab) -> Claim:
    return lab.recall(ours=[("generative", {"window": 64})], baseline=[("lora", {})])
