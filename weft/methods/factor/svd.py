"""Two thin factors in place of a weight: its truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr
from weft.linalg.lowrank import affordable, truncate

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", drops=("zeros",))
def svd(
    g: Group,
    *,
    keep: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of the weight's entries that both factors hold",
            json_schema_extra={"better": "up"},
        ),
    ] = 0.8,
) -> Expr:
    """W' = B A = argmin over rank r of ||W - B A||_F, in bfloat16; r as large as the share allows, at least 1.

    A weight that is no smaller at rank 1 is left as it is, which is declared.
    """
    rank = affordable(*g.now.shape, keep)
    if not rank:
        g.fallback("no rank makes it smaller: left as it is")
        return g.now
    return truncate(g.now.dense(), rank)


@svd.claim("four fifths of the entries lose less than half of what a half of them loses")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("svd", {"keep": 0.8})], baseline=[("svd", {"keep": 0.5})], factor=0.5)
