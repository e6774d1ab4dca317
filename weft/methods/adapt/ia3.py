"""Learned scales of keys, values and inner activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Diagonal, Expr, between
from weft.expr.named import Named

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2205.05638", on=("key", "value", "down"), drops=("zeros",))
def ia3(
    g: Group,
    *,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Scale keys, values and the inside of feed-forward parts by trainable vectors that start at one.

    Of keys and values W' = diag(l) W; of what reads the inside W' = W diag(l). Biases and adapters beside W are not scaled.
    Where one weight makes queries too, they are scaled as well. Behind a side a pattern of zeros is no longer known as one.
    """
    down = "down" in g.site.tags
    side = Named(Diagonal(nn.Parameter(torch.ones(g.now.shape[int(down)]))), name)
    if g.now.promises().zeros:
        g.fallback(f"later steps may fill the zeros of {g.now.describe()}")
    return between((), g.now, (side,)) if down else between((side,), g.now, ())


@ia3.claim("gains at least what LoRA of rank 1 gains on a shifted domain, with a third of its parameters")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("ia3", {})], baseline=[("lora", {"rank": 1})], share=1.0)
