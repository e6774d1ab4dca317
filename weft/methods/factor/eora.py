"""Training-free low-rank compensation in the eigenspace of the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr, total
from weft.linalg.lowrank import whitened

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(
    kind="rewrite",
    rows="P190",
    paper="2410.21271",
    needs={"gram"},
    beats=Beats("svd_residual", start="rtn", start_options={"bits": 3}),
)
def eora(
    g: Group,
    *,
    rank: Annotated[
        int, Field(ge=1, le=4096, description="rank of the compensation", json_schema_extra={"better": "up"})
    ] = 16,
) -> Expr:
    """Add the rank-r matrix that best restores the layer's output rather than its weights.

    W' = W + B A with B A = argmin over rank r of || (W0 - W - B A) E[x xᵀ]^(1/2) ||_F.
    """
    error = g.original - g.now.dense().float()
    return total({"base": g.now, "compensation": whitened(error, *g.roots(), rank)})


@eora.claim("restores more of a 3-bit model than plain SVD at the same rank")
def claim(lab: Lab) -> Claim:
    rounded = ("rtn", {"bits": 3, "group": 0})
    return lab.compare(
        ours=[rounded, ("eora", {"rank": 16})], baseline=[rounded, ("svd_residual", {"rank": 16})], floor=[rounded]
    )
