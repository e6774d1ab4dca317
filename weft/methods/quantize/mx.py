"""Microscaling formats: small floats under a shared power of two, and NVFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Group, method
from weft.expr import Expr
from weft.linalg.grids import minmax, nearest
from weft.linalg.sparse import quantize

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

Format = Literal["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4"]


@method(kind="rewrite", paper="2310.10537", rowwise=True)
def mx(
    g: Group,
    *,
    format: Annotated[
        Format, Field(description="OCP MX 1.0, 32 columns a scale; or NVFP4, 16 columns a scale")
    ] = "mxfp4",
) -> Expr:
    """Round every weight to the nearest small float: w ≈ scale · float, the scale a power of two for every 32 columns.

    The scale is the least under which the largest entry rounds to the top float. NVFP4 has 8-bit float scales for every 16
    columns; departure: its float32 factor is that of a row, not of the whole matrix, so that rows can be cut apart.
    """
    nv = format == "nvfp4"
    name, group, scale = ("fp4", 16, "e4m3") if nv else (format.removeprefix("mx"), 32, "e8m0")
    return quantize(g.now, lambda w: (f := minmax(w, name, group, True, scale), nearest(w, f)))


@mx.claim("6-bit floats are near lossless: they cost less than a tenth of what 4-bit floats cost")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("mx", {"format": "mxfp6_e2m3"})], baseline=[("mx", {"format": "mxfp4"})], factor=0.1)
