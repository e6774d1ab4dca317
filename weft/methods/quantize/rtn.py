"""Round every weight to the nearest point of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr
from weft.linalg.grids import minmax, nearest
from weft.linalg.sparse import quantize

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rowwise=True)
def rtn(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
) -> Expr:
    """Round to nearest: every group of columns of a row gets the grid that just covers it.

    code = round(w / scale) + zero, with scale = absmax / (2^(bits-1) - 1), or (max - min) / (2^bits - 1) and a zero point.
    A zero pattern stays: only kept entries are rounded.
    """
    return quantize(g.now, lambda w: (f := minmax(w, f"int{bits}", group, symmetric), nearest(w, f)))


@rtn.claim("8 bits are near lossless: they cost less than a hundredth of what 4 bits cost")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("rtn", {"bits": 8})], baseline=[("rtn", {"bits": 4})], factor=0.01)
