"""Prune by weights and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.masks import best, sparse

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2306.11695", needs={"gram"}, rowwise=True, beats=Beats("magnitude"))
def wanda(
    g: Group,
    *,
    sparsity: Annotated[
        float, Field(ge=0, le=0.99, description="share of each row set to zero", json_schema_extra={"better": "down"})
    ] = 0.5,
    pattern: Annotated[
        Literal["row", "2:4", "4:8"], Field(description="row, or N of every M columns kept (sparsity is then N:M's)")
    ] = "row",
) -> Expr:
    """Keep the entries of each row with the largest |w_ij| sqrt(E[x_j²]); no update of the others."""
    w = g.now.dense()
    score = w.abs().float() * g.second_moment().sqrt().float()
    return sparse(w, best(score, pattern, sparsity, g.name), pattern)


@wanda.claim("loses less than magnitude pruning at 50 % sparsity")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("wanda", {"sparsity": 0.5})], baseline=[("magnitude", {"sparsity": 0.5})])
