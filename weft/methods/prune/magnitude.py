"""Zero the entries of smallest magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr
from weft.linalg.masks import best, sparse

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P261", rowwise=True)
def magnitude(
    g: Group,
    *,
    sparsity: Annotated[
        float, Field(ge=0, le=0.99, description="share of each row set to zero", json_schema_extra={"better": "down"})
    ] = 0.5,
    pattern: Annotated[
        Literal["row", "2:4", "4:8"], Field(description="row, or N of every M columns kept (sparsity is then N:M's)")
    ] = "row",
) -> Expr:
    """Keep the entries of each row, or of every M columns, with the largest |w_ij|; no update of the others."""
    w = g.now.dense()
    return sparse(w, best(w.abs().float(), pattern, sparsity, g.name), pattern)


@magnitude.claim(
    "has a knee: 20 % sparsity in one shot costs less than a tenth of what 60 % costs (essential sparsity)"
)
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("magnitude", {"sparsity": 0.2})], baseline=[("magnitude", {"sparsity": 0.6})], factor=0.1)
