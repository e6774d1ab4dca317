"""Spend a byte budget by the Fisher information of every single weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import Bench, method
from weft.linalg.allocation import dynamic

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="search", paper="2306.07629", needs={"fisher"})
def sensitivity(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    bench: Bench,
    *,
    cells: Annotated[
        int, Field(ge=64, le=65536, description="how finely bytes above the least possible are told apart")
    ] = 8192,
) -> Int[Tensor, "s"]:
    """Minimise Σ_s ½ Σ_ij F_ij (W_c - W)_ij², F_ij = E[(dL/dw_ij)²], within the budget, by dynamic programming over bytes.

    `error` only says what is available. Where `knapsack` takes the gradients of outputs and the inputs as independent and keeps
    how inputs correlate, F has their product, weight by weight, and no correlation. Departure from the paper (SqueezeLLM),
    which places levels inside a weight by F: here F decides between weights. Errors: ConflictError with the least bytes that
    would do.
    """
    score = torch.where(error.isfinite(), bench.fisher(), torch.inf)
    return dynamic(cost, score, budget, cells=cells, where="sensitivity")


@sensitivity.claim("loses less than the knapsack of predicted losses at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="sensitivity", baseline="knapsack", share=0.2)
