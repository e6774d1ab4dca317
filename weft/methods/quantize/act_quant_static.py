"""Round what weights read under one scale for good, measured on calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Group, method
from weft.model import Rounding

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

GridName = Literal[
    "int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"
]


@method(kind="rewrite", paper="2004.09602", needs={"most"}, per="input", taps=True)
def act_quant_static(
    g: Group, *, grid: Annotated[GridName, Field(description="number format of activations")] = "int8"
) -> Group:
    """Round the input to nearest, x ≈ scale · code with scale = max |x| / top of all calibration tokens; beyond it x is cut off.

    Nothing is measured when the model runs. The gradient passes straight through, also where x is cut off.
    """
    reach = float(g.most().max())
    if not reach > 0:
        g.fallback("no input was seen: the scale is that of inputs up to 1")
    return g.rounded(Rounding.static(grid, reach or 1.0))


@act_quant_static.claim("8-bit activations under a measured scale cost less than a tenth of what 4-bit tokens cost")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("act_quant_static", {})], baseline=[("act_quant", {"grid": "int4"})], factor=0.1)
