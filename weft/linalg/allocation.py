"""One candidate a site within a budget: which ones are worth a look, and the exact choice, by two solvers."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from weft.error import ConflictError, NumericError


def frontier(cost: Int[Tensor, "s c"], error: Float[Tensor, "s c"], budget: int, where: str) -> Bool[np.ndarray, "s c"]:
    """The candidates that cost less or err less than every other of their site; those that are not finite are not available.

    Errors: ConflictError with the least bytes that would do.
    """
    c, e = cost.double().numpy(), error.double().numpy()
    usable = np.isfinite(e) & np.isfinite(c)
    least = float(np.where(usable, c, np.inf).min(1).sum())
    if not least <= budget:
        want = f"at least {int(least)} bytes" if np.isfinite(least) else "a usable candidate for every site"
        raise ConflictError(
            "no choice fits the budget",
            where=where,
            got=f"{budget} bytes",
            want=want,
            fix="raise the budget or add smaller candidates",
        )
    for s in range(len(c)):
        best = np.inf
        for k in np.lexsort((e[s], c[s])):
            usable[s, k] = usable[s, k] and e[s, k] < best
            best = e[s, k] if usable[s, k] else best
    return usable


def integer(
    cost: Int[Tensor, "s c"], error: Float[Tensor, "s c"], budget: int, *, gap: float, where: str
) -> Int[Tensor, "s"]:
    """The x that minimises Σ_s error[s, x_s] subject to Σ_s cost[s, x_s] <= budget, to a relative gap: an integer programme.

    Errors: ConflictError as `frontier`; NumericError if the solver ends without a choice.
    """
    rows, cols = np.nonzero(frontier(cost, error, budget, where))
    ce, ee = cost.double().numpy()[rows, cols], error.double().numpy()[rows, cols]
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
    if len(picked) != len(cost) or ce[picked].sum() > budget:
        raise NumericError(
            "the allocation was not solved",
            where=where,
            got=str(made.message),
            want=f"one choice for each of {len(cost)} sites within {budget} bytes",
            fix="raise the gap, or the budget a little",
        )
    out = torch.empty(len(cost), dtype=torch.long)
    out[torch.as_tensor(rows[picked])] = torch.as_tensor(cols[picked])
    return out


def dynamic(
    cost: Int[Tensor, "s c"], error: Float[Tensor, "s c"], budget: int, *, cells: int, where: str
) -> Int[Tensor, "s"]:
    """The same choice by dynamic programming over bytes: best[b] = min over c of best of the sites before at b - cost, plus error.

    What the budget leaves above each site's cheapest candidate is cut into at most `cells` cells and costs are rounded up to
    them. So nothing that fits with one cell a site to spare is better; where the cells hold the costs' common divisor, nothing
    that fits is. Errors: ConflictError as `frontier`.
    """
    usable = frontier(cost, error, budget, where)
    c, e = cost.numpy().astype(np.int64), error.double().numpy()
    extra = c - np.where(usable, c, np.iinfo(np.int64).max).min(1, keepdims=True)
    spare = budget - int((c - extra)[:, 0].sum())
    unit = max(1, int(np.gcd.reduce(extra[usable])), -(-spare // cells))
    used, room = -(-extra // unit), spare // unit
    best, taken = np.zeros(room + 1), np.zeros((len(c), room + 1), dtype=np.int64)
    for s in range(len(c)):
        after = np.full(room + 1, np.inf)
        for k in np.flatnonzero(usable[s] & (used[s] <= room)):
            at = int(used[s, k])
            made = best[: room + 1 - at] + e[s, k]
            better = made < after[at:]
            after[at:][better], taken[s, at:][better] = made[better], k
        best = after
    choice, left = np.zeros(len(c), dtype=np.int64), room
    for s in reversed(range(len(c))):
        choice[s] = taken[s, left]
        left -= int(used[s, choice[s]])
    return torch.as_tensor(choice)


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
