"""Entry by entry products of two low-rank matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, total
from weft.expr.entrywise import Entrywise

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2108.06098")
def loha(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=1024, description="rank of each product")] = 4,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add (B A) ⊙ (D C), entry by entry, of rank up to `rank`²; with D = 0 it changes nothing until it is trained.

    FedPara's parametrization, as an adapter. A and C [r n] start normal of variance 1 and B [m r] of variance 0.01, as in LyCORIS.
    Departure from LyCORIS: no alpha, whose place is the learning rate.
    """
    m, n = g.now.shape
    rng = g.rng(f"loha {name}")
    b, a, c = 0.1 * torch.randn(m, rank, generator=rng), *(torch.randn(rank, n, generator=rng) for _ in range(2))
    pairs = [LowRank(nn.Parameter(left), nn.Parameter(right)) for left, right in ((b, a), (torch.zeros(m, rank), c))]
    return total({"base": g.now, f"adapter:{name}": Entrywise(pairs)})


@loha.claim("with as many parameters gains at least what LoRA gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("loha", {"rank": 4})], baseline=[("lora", {"rank": 8})], share=1.0)
