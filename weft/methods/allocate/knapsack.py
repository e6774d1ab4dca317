"""Spend a byte budget where it lowers the predicted loss most."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from weft.engine import method
from weft.error import ConflictError, NumericError

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
    unit = int(np.gcd.reduce(ce.astype(np.int64)))  # whole numbers of it: no choice is a little over the budget
    one = coo_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    with _muted():
        made = milp(
            ee / max(float(ee.max()), 1e-30),
            constraints=[
                LinearConstraint(one.tocsr(), 1, 1),
                LinearConstraint(ce[None] / max(1, unit), -np.inf, budget // max(1, unit)),
            ],
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": gap},
        )
    picked = np.flatnonzero(np.round(made.x) == 1) if made.x is not None else np.array([], dtype=np.int64)
    if len(picked) != len(c) or ce[picked].sum() > budget:
        raise NumericError(
            "the allocation was not solved",
            where="knapsack",
            got=str(made.message),
            want=f"one choice for each of {len(c)} sites within {budget} bytes",
            fix="raise the gap, or the budget a little",
        )
    out = torch.empty(len(c), dtype=torch.long)
    out[torch.as_tensor(rows[picked])] = torch.as_tensor(cols[picked])
    return out


@contextmanager
def _muted() -> Generator[None]:
    """Drop what the solver's C++ prints to standard output, where results go."""
    sys.stdout.flush()
    held, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C keeps what it prints to a pipe until later
        os.dup2(held, 1)
        os.close(held)
        os.close(nowhere)


def _drop_dominated(cost: Any, error: Any, usable: Any) -> None:
    """Mark candidates unusable that cost no less and err no less than another."""
    best = np.inf
    for k in np.lexsort((error, cost)):
        usable[k] = usable[k] and error[k] < best
        best = error[k] if usable[k] else best


@knapsack.claim("loses less than the best uniform width at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="knapsack", baseline="uniform", share=0.2)
