"""Training in a random subspace: the intrinsic dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Basis, Expr, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P260", paper="2012.13255")
def said(
    g: Group,
    *,
    count: Annotated[int, Field(ge=1, le=1 << 20, description="dimensions of each weight's subspace")] = 256,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add P z, laid out as a matrix, of `count` trainable numbers z = 0 and a frozen Fastfood transform P of entries of variance 1 / (m n).

    P goes through Hadamard transforms, signs, a permutation and gains, which follow from the seed, the name and the shape alone.
    Departures from the paper: every weight has its z, rather than one for the whole model, and so needs no scale a layer (SAID); and gains
    are uniform, not normal.
    """
    m, n = g.now.shape
    most = min(count, m * n)
    if most < count:
        g.fallback(f"{most} dimensions, which is all of a weight of {m} x {n}")
    term = Basis(nn.Parameter(torch.zeros(most)), "fastfood", g.common(f"said {name}"), m, n, (m * n) ** -0.5)
    return total({"base": g.now, f"adapter:{name}": term})


@said.claim("256 dimensions a weight reach at least 90 % of what full fine-tuning gains")
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").tune(ours=[("said", {"count": 256})], baseline=[("full", {})], share=0.9)
