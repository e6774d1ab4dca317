"""A few trained spectral coefficients at random places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Basis, Expr, total
from weft.expr.basis import DRAWN

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2405.03003")
def fourierft(
    g: Group,
    *,
    count: Annotated[int, Field(ge=1, le=1 << 20, description="coefficients")] = 1000,
    alpha: Annotated[float, Field(gt=0, le=1e6, description="what the inverse transform is multiplied by")] = 1.0,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add alpha times the real part of the orthonormal inverse Fourier transform [m n] of a sparse spectrum; only its entries train.

    Their places are drawn once for all weights of a shape, as PEFT draws them, and are in no file. They start at zero: it changes
    nothing until it is trained.
    Departures from the paper: a start from zero instead of normal numbers, which would change the output; and an orthonormal transform, so
    that a step at one rate is as long whatever the shape (the paper's alpha is sqrt(m n) times this one).
    """
    m, n = g.now.shape
    most = min(count, m * n)
    if most < count:
        g.fallback(f"{most} coefficients, which is all of a weight of {m} x {n}")
    scale = alpha * (2 * m * n) ** -0.5  # the basis has entries of variance 1, √2 cos
    kind = "fourier_mt19937" if m * n < DRAWN else "fourier"
    term = Basis(nn.Parameter(torch.zeros(most)), kind, g.common(f"fourierft {name}"), m, n, scale)
    return total({"base": g.now, f"adapter:{name}": term})


@fourierft.claim("1000 coefficients a weight reach at least 90 % of what LoRA of rank 8 gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("fourierft", {"count": 1000})], baseline=[("lora", {"rank": 8})], share=0.9)
