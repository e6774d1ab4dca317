"""Orthogonal fine-tuning: rotations of what weights read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, between
from weft.expr.cayley import Cayley
from weft.expr.named import Named

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2306.07280", drops=("zeros",))
def oft(
    g: Group,
    *,
    block: Annotated[int, Field(ge=2, le=1024, description="inputs that one rotation is of")] = 32,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Put trainable rotations R of blocks of inputs beside the weight, W' = W R; it changes nothing until they are trained.

    R = (I + Q)(I - Q)⁻¹ of skew Q, which starts at zero (Cayley). Rows of W keep their lengths and the angles between them. The weight
    stays packed: its product is W (R x). Where `block` does not divide the inputs, the nearest size that does is taken. Adapters and a
    compensation beside W are not rotated. Behind a side a pattern of zeros is no longer known as one.
    """
    n = g.now.shape[1]
    size = min((k for k in range(2, n + 1) if n % k == 0), key=lambda k: abs(math.log(k / block)), default=1)
    if size != block:
        g.fallback(f"rotations of {size} of {n} inputs, not of {block}" if n > 1 else "one input has no rotation")
    if g.now.promises().zeros:
        g.fallback(f"later steps may fill the zeros of {g.now.describe()}")
    q = nn.Parameter(torch.zeros(n // size, size * (size - 1) // 2))
    return between((), g.now, (Named(Cayley(q, size), name),))


@oft.claim("with rotations of 32 gains at least what LoRA of rank 8 gains, with fewer parameters")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("oft", {"block": 32})], baseline=[("lora", {"rank": 8})], share=1.0)
