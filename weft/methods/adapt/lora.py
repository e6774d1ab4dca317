"""Low-rank adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, total
from weft.expr.weightnorm import WeightNorm
from weft.linalg.lowrank import truncate

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2106.09685")
def lora(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of the adapter")] = 8,
    alpha: Annotated[
        float, Field(gt=0, le=1e6, description="what the product is multiplied by, before `scaling`")
    ] = 1.0,
    scaling: Annotated[
        Literal["constant", "rank", "root"],
        Field(
            description="constant: by alpha. rank: by alpha / rank, as in LoRA. root: by alpha / sqrt(rank), as in rsLoRA"
        ),
    ] = "constant",
    init: Annotated[
        Literal["zero", "pissa"],
        Field(description="zero: B = 0, A random. pissa: the largest singular directions of the weight"),
    ] = "zero",
    magnitude: Annotated[
        bool, Field(description="train the lengths of the rows apart from their directions, as in DoRA")
    ] = False,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add a trainable term s B A in float32, s of `alpha` and `scaling`; it changes nothing until it is trained.

    zero: B = 0 and A uniform in ±sqrt(3 / n). pissa (arXiv 2404.02948): s B A starts as the best rank-r approximation of the weight, halves
    U sqrt(S) and sqrt(S) Vᵀ, and what it starts with is taken away by a frozen term `adapter:NAME-start`, so that the base stays as it
    is, packed or not, and the two together are a LoRA of twice the rank for other tools.
    magnitude (DoRA, arXiv 2402.09353): the value is g[i] v[i] / ||v[i]|| of rows v of the base with the adapter; g = ||v|| is trained too.

    Departure from LoRA and rsLoRA (arXiv 2312.03732): by default s is 1, and its place is the learning rate.
    """
    s = alpha / {"constant": 1, "rank": rank, "root": math.sqrt(rank)}[scaling]
    role = f"adapter:{name}"
    if init == "pissa":
        first = truncate(g.now.dense().detach() / s, rank, torch.float32)
        terms = {role: _trainable(first.b.clone(), first.a.clone(), s), f"{role}-start": first.rebuild(scale=-s)}
    else:
        m, n = g.now.shape
        a = (torch.rand(rank, n, generator=g.rng(f"lora {name}")) * 2 - 1) * math.sqrt(3 / n)
        terms = {role: _trainable(torch.zeros(m, rank), a, s)}
    made = total({"base": g.now, **terms})
    if not magnitude:
        return made
    apart = WeightNorm.of(made)
    return apart.rebuild(g=nn.Parameter(apart.g))


def _trainable(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"], scale: float) -> LowRank:
    return LowRank(nn.Parameter(b), nn.Parameter(a), scale)


@lora.claim("at rank 16 reaches at least 80 % of what rank 64 gains on a shifted domain, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16})], baseline=[("lora", {"rank": 64})], share=0.8)


@lora.claim(
    "with alpha / sqrt(rank) rank 64 gains more than with alpha / rank, alpha 8", of="rslora", paper="2312.03732"
)
def rslora(lab: Lab) -> Claim:
    ours, baseline = ({"rank": 64, "alpha": 8.0, "scaling": scaling} for scaling in ("root", "rank"))
    return lab.tune(ours=[("lora", ours)], baseline=[("lora", baseline)], share=1.0)


@lora.claim("trained with magnitudes apart, rank 4 gains more", of="dora", paper="2402.09353")
def dora(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 4, "magnitude": True})], baseline=[("lora", {"rank": 4})], share=1.0)


@lora.claim(
    "started from the largest singular directions, rank 16 gains more after the same steps",
    of="pissa",
    paper="2404.02948",
)
def pissa(lab: Lab) -> Claim:
    return lab.tune(ours=[("lora", {"rank": 16, "init": "pissa"})], baseline=[("lora", {"rank": 16})], share=1.0)
