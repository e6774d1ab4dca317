"""Spend a byte budget where it lowers the predicted loss most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.linalg.allocation import integer

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="search")
def knapsack(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    *,
    gap: Annotated[float, Field(ge=0, le=0.1, description="relative gap at which the search stops")] = 1e-4,
) -> Int[Tensor, "s"]:
    """One choice a site: minimise Σ_s error[s, x_s] subject to Σ_s cost[s, x_s] <= budget, as an integer programme.

    Entries that are not finite are not available. Errors: ConflictError with the least bytes that would do;
    NumericError if the solver ends without a choice.
    """
    return integer(cost, error, budget, gap=gap, where="knapsack")


@knapsack.claim("loses less than the best uniform width at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="knapsack", baseline="uniform", share=0.2)
