"""Trained scales of frozen random factors that all weights share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Basis, Diagonal, Expr, Product, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2310.11454")
def vera(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of the random factors")] = 256,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add diag(b) B diag(d) A with trainable b [m] = 0 and d [r] = 0.1; it changes nothing until it is trained.

    A [r n] and B [m r] are frozen, uniform of variance 2 / n and 2 / r, and follow from the seed, the name and their shape alone: weights
    of one width share them, and no file has them.
    Departure: the paper cuts the factors of all weights out of one pair, of the largest width.
    """
    m, n = g.now.shape
    down = Basis(torch.ones(1), "random", g.common(f"vera {name} A"), rank, n, (2 / n) ** 0.5)
    up = Basis(torch.ones(1), "random", g.common(f"vera {name} B"), m, rank, (2 / rank) ** 0.5)
    d, b = (Diagonal(nn.Parameter(start)) for start in (torch.full((rank,), 0.1), torch.zeros(m)))
    return total({"base": g.now, f"adapter:{name}": Product(b, up, d, down)})


@vera.claim(
    "at rank 256 reaches at least 90 % of what LoRA of rank 8 gains, with less than an eighth of its parameters"
)
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("vera", {"rank": 256})], baseline=[("lora", {"rank": 8})], share=0.9)
