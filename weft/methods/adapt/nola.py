"""Low-rank factors that are mixed of random matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Basis, Expr, Product, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P273", paper="2310.02556")
def nola(
    g: Group,
    *,
    count: Annotated[int, Field(ge=1, le=1 << 16, description="random matrices that each factor is mixed of")] = 64,
    rank: Annotated[int, Field(ge=1, le=1024, description="rank of the adapter")] = 4,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add (Σ b_j B_j) (Σ a_i A_i) with trainable b = 0 and random a; it changes nothing until it is trained.

    The matrices A_i [r n] and B_j [m r] are frozen, uniform of variance 1 / (n count) and 1 / count, and follow from the seed, the name
    and their shape alone: weights of one width share them, so that they are generated once, and no file has them. What trains has
    2 `count` numbers whatever the weight.
    """
    m, n = g.now.shape
    a, b = torch.randn(count, generator=g.rng(f"nola {name}")), torch.zeros(count)
    down = Basis(nn.Parameter(a), "random", g.common(f"nola {name} A"), rank, n, (n * count) ** -0.5)
    up = Basis(nn.Parameter(b), "random", g.common(f"nola {name} B"), m, rank, count**-0.5)
    return total({"base": g.now, f"adapter:{name}": Product(up, down)})


@nola.claim("with less than half of its parameters gains at least what LoRA of rank 1 gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("nola", {"count": 160, "rank": 4})], baseline=[("lora", {"rank": 1})], share=1.0)
