"""Prune by weights and activations, then let kept and pruned entries trade places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.masks import best, sparse
from weft.linalg.swaps import swapped

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2512.10922", needs={"gram"}, rowwise=True, beats=Beats("wanda"))
def sparseswaps(
    g: Group,
    *,
    sparsity: Annotated[
        float, Field(ge=0, le=0.99, description="share of each row set to zero", json_schema_extra={"better": "down"})
    ] = 0.5,
    pattern: Annotated[
        Literal["row", "2:4", "4:8"], Field(description="row, or N of every M columns kept (sparsity is then N:M's)")
    ] = "row",
    swaps: Annotated[
        int, Field(ge=1, le=10000, description="most swaps in a row", json_schema_extra={"better": "up"})
    ] = 100,
) -> Expr:
    """Start from Wanda's mask; in each row, as long as E[(Σ_j e_j x_j)²] falls, swap a kept entry with a pruned one, e what is pruned.

    No update of the others; no row ever loses more than under Wanda's mask. Departure from the paper: the best pair is looked
    for among the 32 kept and the 32 pruned entries that are best alone rather than among all, so that a swap takes time
    linear in the columns.
    """
    w = g.now.dense()
    start = best(w.abs().float() * g.second_moment().sqrt().float(), pattern, sparsity, g.name)
    return sparse(w, swapped(w, g.gram(), start, pattern, swaps), pattern)


@sparseswaps.claim("loses less than Wanda at 50 % sparsity")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("sparseswaps", {"sparsity": 0.5, "swaps": 30})], baseline=[("wanda", {"sparsity": 0.5})])
