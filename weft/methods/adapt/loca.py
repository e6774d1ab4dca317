"""A few trained coefficients of a cosine transform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Basis, Expr, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P419", paper="2502.06820")
def loca(
    g: Group,
    *,
    count: Annotated[int, Field(ge=1, le=1 << 20, description="coefficients")] = 1000,
    alpha: Annotated[float, Field(gt=0, le=1e6, description="what the inverse transform is multiplied by")] = 1.0,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add alpha times the inverse cosine transform [m n] of a sparse spectrum; only its entries train, from zero.

    Departures from the paper: places stay where they are drawn, once for all weights of a shape, unless it is trained under `relocate`,
    which moves them in the first part of the training; and waves of frequency zero are √2 times as high as in the orthonormal
    transform.
    """
    m, n = g.now.shape
    most = min(count, m * n)
    if most < count:
        g.fallback(f"{most} coefficients, which is all of a weight of {m} x {n}")
    term = Basis(nn.Parameter(torch.zeros(most)), "cosine", g.common(f"loca {name}"), m, n, alpha * (m * n) ** -0.5)
    return total({"base": g.now, f"adapter:{name}": term})


@loca.claim("gains at least what as many coefficients of a Fourier transform gain")
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").tune(
        ours=[("loca", {"count": 1000})], baseline=[("fourierft", {"count": 1000})], share=1.0
    )
