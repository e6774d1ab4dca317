"""Spend a byte budget where it lowers the predicted loss most."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from weft.engine import method
from weft.error import ConflictError


@method(kind="search")
def knapsack(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    *,
    gap: Annotated[float, Field(ge=0, le=0.1, description="relative gap at which the search stops")] = 1e-4,
) -> Int[Tensor, "s"]:
    """One choice a site: minimise Σ error[s, x_s] subject to Σ cost[s, x_s] <= budget."""
    c, e = cost.double().numpy(), error.double().numpy()
    usable = np.isfinite(e) & np.isfinite(c)
    least = int(np.where(usable, c, np.inf).min(1).sum())
    if least > budget:
        raise ConflictError("no choice fits the budget", where="knapsack", got=f"{budget} bytes", want=f"at least {least} bytes", fix="raise the budget or add smaller candidates")
    for s in range(len(c)):
        order = np.lexsort((e[s], c[s]))
        best = np.inf
        for k in order:
            if usable[s, k] and e[s, k] < best:
                best = e[s, k]
            else:
                usable[s, k] = False
    rows, cols = np.nonzero(usable)
    ce, ee = c[rows, cols], e[rows, cols]
    scale = max(float(ee.max()), 1e-30)
    one = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    made = milp(
        ee / scale,
        constraints=[LinearConstraint(one.tocsr(), 1, 1), LinearConstraint(ce[None] / budget, -np.inf, 1)],
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    picked = np.flatnonzero(np.round(made.x) == 1)
    out = torch.zeros(len(c), dtype=torch.long)
    out[torch.as_tensor(rows[picked])] = torch.as_tensor(cols[picked])
    return out
