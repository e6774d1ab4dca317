"""Prune by what a weight is in its row and in its column, and by activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.masks import best, sparse

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", needs={"gram"}, beats=Beats("magnitude"))
def ria(
    g: Group,
    *,
    sparsity: Annotated[
        float, Field(ge=0, le=0.99, description="share of each row set to zero", json_schema_extra={"better": "down"})
    ] = 0.5,
    pattern: Annotated[
        Literal["row", "2:4", "4:8"], Field(description="row, or N of every M columns kept (sparsity is then N:M's)")
    ] = "row",
    alpha: Annotated[float, Field(ge=0, le=2, description="power of the input's size; 0: weights alone")] = 0.5,
) -> Expr:
    """Keep the entries of each row with the largest (|w_ij| / Σ_j |w_ij| + |w_ij| / Σ_i |w_ij|) E[x_j²]^(alpha/2).

    From "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (ICLR 2024), without its order of
    columns for N:M.
    """
    w = g.now.dense()
    size = w.abs().float()
    relative = sum(size / size.sum(d, keepdim=True).clamp(min=1e-30) for d in (0, 1))
    score = relative * g.second_moment().float() ** (alpha / 2)
    return sparse(w, best(score, pattern, sparsity, g.name), pattern)


@ria.claim("loses less than Wanda at 50 % sparsity")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("ria", {"sparsity": 0.5})], baseline=[("wanda", {"sparsity": 0.5})])
