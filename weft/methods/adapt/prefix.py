"""Prefix tuning: trained keys and values in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model import Prefix

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", paper="2101.00190")
def prefix(
    model: Trunk,
    *,
    length: Annotated[int, Field(ge=1, le=1024, description="virtual tokens")] = 16,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Prefix:
    """Put trainable keys and values before those of the text, in the attention of every layer of a decoder. All weights stay frozen.

    They begin as the keys and values of a text of tokens drawn from the vocabulary, and change the output from the start.
    Departure from the paper: they are trained themselves, not through a network that makes them; the start from real activations,
    which the paper finds to matter most with little data, takes its place.
    """
    keys, values = model.attended(model.sampled(length, f"prefix {name}"))
    return Prefix(at=model.at, name=name, keys=nn.Parameter(keys), values=nn.Parameter(values))


@prefix.claim("gains more than as many virtual tokens at the input alone, after the same steps")
def claim(lab: Lab) -> Claim:
    arms = {"ours": [("prefix", {"length": 20})], "baseline": [("prompt", {"length": 20})]}
    return lab.only("ref-lm").tune(**arms, share=1.0)
