"""Round every weight to the nearest point of a grid."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr
from weft.linalg.sparse import quantize
from weft.linalg.grids import minmax, nearest


@method(kind="rewrite", rowwise=True)
def rtn(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
) -> Expr:
    """Round to nearest: each row's groups get the grid that just covers them.

    code = round(w / scale) + zero, scale = absmax / (2^(bits-1) - 1), or (max - min) / (2^bits - 1) with a zero point.
    """
    return quantize(g.now, lambda w: (f := minmax(w, f"int{bits}", group, symmetric), nearest(w, f)))
