"""Prune one block of columns at a time and let the columns to the right make up for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.columns import solve
from weft.linalg.masks import best, sparse

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(
    kind="rewrite", paper="2301.00774", needs={"gram"}, rowwise=True, beats=Beats("wanda", options={"pattern": "2:4"})
)
def sparsegpt(
    g: Group,
    *,
    sparsity: Annotated[
        float, Field(ge=0, le=0.99, description="share of each row set to zero", json_schema_extra={"better": "down"})
    ] = 0.5,
    pattern: Annotated[
        Literal["row", "2:4", "4:8"], Field(description="row, or N of every M columns kept (sparsity is then N:M's)")
    ] = "row",
    damp: Annotated[float, Field(gt=0, le=1, description="share of the mean diagonal added to the Gram")] = 0.01,
) -> Expr:
    """Second-order pruning: in each block of 128 columns drop the entries with the smallest w_ij² / U_jj², U from (G + λI)^-1 = Uᵀ U,

    and push what was dropped onto the columns to the right. Departure from the paper: the share is dropped in every row of a
    block rather than in the block as a whole, so that all rows keep the same count and the mask is stored without offsets.
    """
    w = g.now.dense()
    upper = g.inverse_factor(damp)
    strength = upper.diagonal().float()
    held = g.now.mask()
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)

    def start(block: Tensor, a: int, b: int, rows: slice) -> None:
        score = (block.T / strength[a:b]).square()
        if held is not None:
            score = score.masked_fill(~held[rows, a:b], -1)
        quota = 1 - (int(sparsity * b) - int(sparsity * a)) / (b - a)
        mask[rows, a:b] = best(score, pattern, 1 - quota + 1e-9, g.name)

    def settle(x: Tensor, j: int, rows: slice) -> Tensor:
        return x * mask[rows, j]

    value = solve(w, upper, settle, start)
    if held is not None:
        value = value * held
    return sparse(value.to(w.dtype), mask, pattern)


@sparsegpt.claim("loses less than Wanda at 2:4")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("sparsegpt", {"pattern": "2:4"})], baseline=[("wanda", {"pattern": "2:4"})])
