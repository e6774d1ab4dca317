"""Give every site the same candidate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.engine import method
from weft.error import ConflictError

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="search")
def uniform(cost: Int[Tensor, "s c"], error: Float[Tensor, "s c"], budget: int) -> Int[Tensor, "s"]:
    """The one candidate, the same for all sites, of least total error within the budget. Errors: ConflictError if none fits."""
    total = cost.double().sum(0)
    usable = torch.isfinite(error).all(0)
    fits = usable & (total <= budget)
    if not bool(fits.any()):
        least = int(total[usable].min()) if bool(usable.any()) else "no candidate that all sites share"
        raise ConflictError(
            "no uniform choice fits the budget",
            where="uniform",
            got=f"{budget} bytes",
            want=f"at least {least}",
            fix="raise the budget",
        )
    best = torch.where(fits, error.double().sum(0), torch.inf).argmin()
    return best.expand(len(cost)).clone()


@uniform.claim("at a larger budget the best uniform width loses less")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="uniform", baseline="uniform", share=0.3, baseline_share=0.2)
