"""Spend a byte budget by how fast the measured loss grows with noise on each weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import Bench, method
from weft.linalg.allocation import integer

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="search", paper="2411.17525", needs={"disturb", "relative"})
def higgs(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    bench: Bench,
    *,
    noise: Annotated[
        float, Field(gt=0, le=1, description="squared size of the noise on a weight, over the weight's")
    ] = 0.01,
    share: Annotated[float, Field(gt=0, le=1, description="share of the texts that the loss is measured on")] = 0.25,
    gap: Annotated[float, Field(ge=0, le=0.1, description="relative gap at which the search stops")] = 1e-4,
) -> Int[Tensor, "s"]:
    """Minimise Σ_s α_s t²_s,c within the budget, t²_s,c = ||W_c - W||² / ||W||², as an integer programme (the linearity theorem).

    α_s is the distance to the original with Gaussian noise of squared relative size `noise` on weight s alone, over `noise`.
    `error` only says what is available. Departures from the paper: one size of noise instead of a fit through many, and the
    distance to the original's outputs instead of the perplexity. Errors: ConflictError with the least bytes that would do;
    NumericError if the solver ends without a choice.
    """
    growth = [max(0.0, bench.disturb(s, noise, share)) / noise for s in range(len(cost))]
    predicted = torch.tensor(growth, dtype=torch.float64)[:, None] * bench.relative()
    return integer(cost, torch.where(error.isfinite(), predicted, torch.inf), budget, gap=gap, where="higgs")


@higgs.claim("loses less than the knapsack of predicted losses at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="higgs", baseline="knapsack", share=0.2)
