"""Spend a byte budget where it lowers the predicted loss most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from weft.engine import method
from weft.error import ConflictError

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

    Entries that are not finite are not available. Errors: ConflictError with the least bytes that would do.
    """
    c, e = cost.double().numpy(), error.double().numpy()
    usable = np.isfinite(e) & np.isfinite(c)
    least = float(np.where(usable, c, np.inf).min(1).sum())
    if not least <= budget:
        want = f"at least {int(least)} bytes" if np.isfinite(least) else "a usable candidate for every site"
        raise ConflictError(
            "no choice fits the budget",
            where="knapsack",
            got=f"{budget} bytes",
            want=want,
            fix="raise the budget or add smaller candidates",
        )
    for s in range(len(c)):
        _drop_dominated(c[s], e[s], usable[s])
    rows, cols = np.nonzero(usable)
    ce, ee = c[rows, cols], e[rows, cols]
    scale = max(float(ee.max()), 1e-30)
    one = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    out = torch.as_tensor(np.where(usable, c, np.inf).argmin(1))  # the cheapest always fits
    for slack in (0, 2e-6):  # the solver may miss a bound by 1e-6 of it: then once more with that much less to spend
        made = milp(
            ee / scale,
            constraints=[
                LinearConstraint(one.tocsr(), 1, 1),
                LinearConstraint(ce[None] / max(1, budget), -np.inf, 1 - slack),
            ],
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap},
        )
        picked = np.flatnonzero(np.round(made.x) == 1) if made.x is not None else []
        if len(picked) == len(c) and ce[picked].sum() <= budget:
            out[torch.as_tensor(rows[picked])] = torch.as_tensor(cols[picked])
            break
    return out


def _drop_dominated(cost: Any, error: Any, usable: Any) -> None:
    """Mark candidates unusable that cost no less and err no less than another."""
    best = np.inf
    for k in np.lexsort((error, cost)):
        usable[k] = usable[k] and error[k] < best
        best = error[k] if usable[k] else best


@knapsack.claim("loses less than the best uniform width at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="knapsack", baseline="uniform", share=0.2)
