"""4-bit NormalFloat: levels at the quantiles of a normal distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.grids import minmax, nearest
from weft.linalg.sparse import quantize

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P106", paper="2305.14314", rowwise=True, beats=Beats("rtn", options={"group": 64}))
def nf4(
    g: Group,
    *,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    double: Annotated[bool, Field(description="8-bit scales under one float a row")] = False,
) -> Expr:
    """Round w / absmax of its group to the nearest of 16 levels, the quantiles of N(0, 1) with an exact zero (QLoRA).

    `double` quantizes the scales too. Departure from the paper: to whole numbers under the largest of their row, rather than
    to 8-bit floats around the mean of 256 scales.
    """
    scale = "uint8" if double else "bf16"
    return quantize(g.now, lambda w: (f := minmax(w, "nf4", group, True, scale), nearest(w, f)))


@nf4.claim("loses less than 4-bit integers at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("nf4", {"group": 64})], baseline=[("rtn", {"bits": 4, "group": 64})])
