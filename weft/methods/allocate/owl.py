"""Spend a byte budget on blocks with outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import Bench, method
from weft.linalg.allocation import frontier

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="search", paper="2310.05175", needs={"outliers"})
def owl(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    bench: Bench,
    *,
    above: Annotated[float, Field(ge=1, le=1000, description="an outlier is this many times the mean score")] = 5.0,
    spread: Annotated[
        float, Field(ge=0, le=0.5, description="half the span between the densest block and the sparsest")
    ] = 0.08,
) -> Int[Tensor, "s"]:
    """Densities d + 2 spread (o_s - min o) / (max o - min o), o_s the outliers' share of block s's scores |w_ij| ||x_j||.

    A density is a candidate's bytes over those of the site's largest; each site gets the densest candidate at or below its
    own (its smallest where there is none), and d is as large as the budget allows. `error` only orders the candidates of one
    site. Departure from the paper: what is evened out are bytes, not numbers of entries, so that any candidates will do.
    Errors: ConflictError with the least bytes that would do.
    """
    usable = torch.as_tensor(frontier(cost, error, budget, "owl"))
    bytes_ = torch.where(usable, cost, 0)
    share = bench.outliers(above)
    more = 2 * spread * (share - share.min()) / (share.max() - share.min()).clamp(min=1e-300)
    density = bytes_.double() / bytes_.amax(1, keepdim=True).clamp(min=1)
    order = torch.where(usable, cost, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
    price = bytes_.gather(1, order)
    steps = price.diff(dim=1).clamp(min=0)  # what each next candidate costs on top; nothing behind the last
    due = torch.where(usable, density - more[:, None], torch.inf).gather(1, order)[:, 1:]
    rank = due.flatten().argsort(dim=0, stable=True)
    spent = price[:, 0].sum() + steps.flatten()[rank].cumsum(0)
    taken = torch.zeros(due.numel(), dtype=torch.bool)
    taken[rank[(spent <= budget) & due.flatten()[rank].isfinite()]] = True
    return order.gather(1, taken.view(due.shape).sum(1, keepdim=True)).flatten()


@owl.claim("at about 70 % zeros loses less than the same sparsity everywhere, at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="owl", baseline="uniform", share=0.33, among="sparsities")
