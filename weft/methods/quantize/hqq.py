"""Fit scales and zero points by a loss that spares outliers, without any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr, spread
from weft.linalg.grids import Fitted, grouped, minmax, nearest, refit, rounded
from weft.linalg.sparse import quantize

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

BETA, GROWTH = 10.0, 1.01


@method(kind="rewrite", rowwise=True, beats=Beats("rtn", options={"bits": 3, "symmetric": False}))
def hqq(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    p: Annotated[
        float, Field(gt=0, le=1, description="exponent of the loss; the smaller, the less outliers count")
    ] = 0.7,
    steps: Annotated[int, Field(ge=1, le=1000, description="rounds of the solver")] = 20,
) -> Expr:
    """Half-quadratic quantization (Badri & Shaji, 2023): the scale and zero point of least Σ |w - q|^p in each group, with p < 1.

    The error is split: e = shrink(w - q) takes what only outliers miss, and the grid is fitted to w - e by least squares, in turns
    while β grows; shrink(r) = sign(r) max(|r| - |r|^(p-1) / β, 0). The best round of each group is kept. A zero pattern stays.
    Departures: zero points are whole codes here, so that zero is a level and q = 0 is exact. A whole zero point only says which
    codes are there, it cannot move the levels between steps as the paper's does; so the scale is fitted with it. r is in
    units of the scale, so that β means the same for all weights.
    """

    def round_(w: Tensor) -> tuple[Fitted, UInt8[Tensor, "m k"]]:
        fit = _solve(w.float(), minmax(w, f"int{bits}", group, False), p, steps)
        return fit, nearest(w, fit)

    return quantize(g.now, round_)


def _solve(w: Float[Tensor, "m k"], fit: Fitted, p: float, steps: int) -> Fitted:
    alike, now, best = torch.ones_like(w[:1]), fit, _loss(w, fit, p)
    for i in range(steps):
        scale = spread(now.scales, now.group, w.shape[1])
        missed = (w - rounded(w, now)) / scale
        size = missed.abs()
        spared = (size - size.clamp(min=1e-12) ** (p - 1) / (BETA * GROWTH**i)).clamp(min=0).copysign(missed)
        now = refit(w - spared * scale, alike, nearest(w, now), now)
        loss = _loss(w, now, p)
        fit, best = fit.mixed(now, loss < best), torch.fmin(loss, best)
    return fit


def _loss(w: Float[Tensor, "m k"], fit: Fitted, p: float) -> Float[Tensor, "m g"]:
    """Σ |w - q|^p of each group."""
    return grouped((w - rounded(w, fit)).abs() ** p, fit.group).sum(-1)


@hqq.claim("loses less than round-to-nearest with a zero point at 3 bits")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("hqq", {"bits": 3})], baseline=[("rtn", {"bits": 3, "symmetric": False})])
