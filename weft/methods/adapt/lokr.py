"""Kronecker products of two small factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, Kronecker, Product, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P258", paper="2309.14859")
def lokr(
    g: Group,
    *,
    factor: Annotated[int, Field(ge=2, le=256, description="rows and columns of the left factor, at most")] = 8,
    rank: Annotated[
        int, Field(ge=1, le=4096, description="rank of the right factor; whole if not below its sides")
    ] = 4096,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add U ⊗ V with trainable U [p q] and V [m/p n/q] = 0, or V = B A with B = 0; it changes nothing until it is trained.

    p and q are the largest divisors of m and n up to `factor`. Of low rank it is (U ⊗ B)(1 ⊗ A), where the unit matrix [q q] is stored
    in bfloat16.
    U starts uniform in ±1 / sqrt(q), A in ±sqrt(3 q / n).
    Departure from LyCORIS: no alpha, whose place is the learning rate.
    """
    m, n = g.now.shape
    p, q = (max(k for k in range(1, min(factor, size) + 1) if size % k == 0) for size in (m, n))
    if p * q == 1:
        g.fallback(f"neither {m} nor {n} has a divisor up to {factor}: the right factor is of the whole size")
    rng = g.rng(f"lokr {name}")
    u = nn.Parameter((torch.rand(p, q, generator=rng) * 2 - 1) / math.sqrt(q))
    if rank < min(m // p, n // q):
        a = (torch.rand(rank, n // q, generator=rng) * 2 - 1) * math.sqrt(3 * q / n)
        unit = torch.eye(q, dtype=torch.bfloat16)
        term = Product(Kronecker(u, nn.Parameter(torch.zeros(m // p, rank))), Kronecker(unit, nn.Parameter(a)))
    else:
        term = Kronecker(u, nn.Parameter(torch.zeros(m // p, n // q)))
    return total({"base": g.now, f"adapter:{name}": term})


@lokr.claim("with a third fewer parameters gains at least what LoRA gains", paper="2402.17412")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("lokr", {"factor": 8})], baseline=[("lora", {"rank": 7})], share=1.0)
