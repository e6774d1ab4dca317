"""Prompt tuning: trained vectors before the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model import Prompt

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", paper="2104.08691")
def prompt(
    model: Trunk,
    *,
    length: Annotated[int, Field(ge=1, le=1024, description="virtual tokens")] = 16,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Prompt:
    """Put trainable vectors before the embedded input: model([P, embed(x)]), without the outputs of P. All weights stay frozen.

    They begin as the embeddings of tokens drawn from the vocabulary, and change the output from the start. An encoder attends to
    them, and what it gives is that of the text alone, so that they are in no mean.
    """
    vectors = model.embedded(model.sampled(length, f"prompt {name}"))
    return Prompt(at=model.at, name=name, vectors=nn.Parameter(vectors))


@prompt.claim("with 20 tokens gains more than with one, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("prompt", {"length": 20})], baseline=[("prompt", {"length": 1})], share=1.0)
