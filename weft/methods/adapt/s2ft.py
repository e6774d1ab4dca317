"""Some input features of each weight, trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P393", paper="2412.06289")
def s2ft(
    g: Group,
    *,
    features: Annotated[
        int, Field(ge=1, le=4096, description="input features of a weight that train, at most all")
    ] = 16,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add D S with S [k n] the rows of the unit matrix of k features and D [m k] trainable, zero at the start.

    So k columns of W train and the others stay. S is drawn once for all weights of a width, frozen and in bfloat16; the term is a LoRA
    of rank k for other tools. Departures from the paper: features are drawn for every weight by its width rather than by heads and
    channels that two weights share, and W is not permuted, for a gather of k features costs as much as a slice.
    """
    m, n = g.now.shape
    k = min(features, n)
    if k < features:
        g.fallback(f"{k} features, which is all of them")
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(g.common(f"s2ft {name}")))[:k].sort().values
    select = torch.zeros(k, n, dtype=torch.bfloat16).index_put(
        (torch.arange(k), drawn), torch.ones((), dtype=torch.bfloat16)
    )
    return total({"base": g.now, f"adapter:{name}": LowRank(nn.Parameter(torch.zeros(m, k)), select)})


@s2ft.claim("with as many parameters gains at least what LoRA gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("s2ft", {"features": 16})], baseline=[("lora", {"rank": 8})], share=1.0)
