"""Add the truncated SVD of what compression lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr, total
from weft.linalg.lowrank import truncate

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2303.08302")
def svd_residual(
    g: Group,
    *,
    rank: Annotated[
        int, Field(ge=1, le=4096, description="rank of the compensation", json_schema_extra={"better": "up"})
    ] = 16,
) -> Expr:
    """Add the best rank-r approximation of the error in weight space (ZeroQuant-V2's LoRC): W' = W + B A, B A = argmin ||W0 - W - B A||_F."""  # noqa: E501
    return total({"base": g.now, "compensation": truncate(g.original - g.now.dense().float(), rank)})


@svd_residual.claim("restores part of what 3-bit rounding loses")
def claim(lab: Lab) -> Claim:
    rounded = ("rtn", {"bits": 3, "group": 0})
    return lab.compare(ours=[rounded, ("svd_residual", {"rank": 16})], baseline=[rounded])
