"""Weights that start anew, to be trained from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from weft.engine import Group, method
from weft.expr import Dense, Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", on=("matrix", "bias", "norm"), drops=("zeros",), paper="2006.05987")
def fresh(g: Group) -> Expr:
    """Put a random trainable matrix in a weight's place: normal entries of the weight's mean square. Norms are one, biases zero.

    Departure: a model's own initial spread is not asked for, since its weights tell it.
    """
    w = g.now.dense().detach().float()
    if "bias" in g.site.tags or "norm" in g.site.tags:
        return Dense(nn.Parameter(torch.full_like(w, float("bias" not in g.site.tags))))
    size = w.square().mean().sqrt() if w.numel() else 0.0
    return Dense(nn.Parameter(torch.randn(w.shape, generator=g.rng("fresh")) * size))


@fresh.claim("of the last block alone, tuned with all others, loses no more than a tenth of what tuning gains")
def claim(lab: Lab) -> Claim:
    ours, baseline = ({"fresh": blocks, "decay": 1.0} for blocks in (1, 0))
    return lab.tune(ours=[("stability", ours)], baseline=[("stability", baseline)], share=0.9)
