"""Two thin factors in place of a weight: the truncated SVD behind whitened inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.lowrank import affordable, whitened

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2403.07378", needs={"gram"}, drops=("zeros",), beats=Beats("svd"))
def svd_llm(
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
    """W' = B A = argmin over rank r of ||(W - B A) E[x xᵀ]^(1/2)||_F, in bfloat16; r as large as the share allows, at least 1.

    A weight that is no smaller at rank 1 is left as it is, which is declared. Departures from the paper: the root of the Gram is
    made of its eigenvectors rather than by Cholesky, so that inputs that never fire need no damping; the factors are not
    tuned afterwards.
    """
    rank = affordable(*g.now.shape, keep)
    to, back = g.roots()
    if not rank:
        g.fallback("no rank makes it smaller: left as it is")
        return g.now
    return whitened(g.now.dense(), to, back, rank)


@svd_llm.claim("loses less than the plain truncated SVD at the same rank")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("svd_llm", {"keep": 0.8})], baseline=[("svd", {"keep": 0.8})])
