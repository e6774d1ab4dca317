"""Round what weights read: activations of 2 to 8 bits, integers or small floats, with scales that follow each token."""

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


@method(kind="rewrite", paper="2206.01861", per="input", taps=True)
def act_quant(
    g: Group,
    *,
    grid: Annotated[GridName, Field(description="number format of activations")] = "int8",
    per: Annotated[Literal["token", "tensor"], Field(description="what has a scale of its own")] = "token",
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale of a token; 0: the whole token")] = 0,
    scale: Annotated[
        Literal["bf16", "e8m0", "e4m3", "uint8"], Field(description="format of a token's scales")
    ] = "bf16",
) -> Group:
    """Round the input to nearest as `rtn` rounds a weight, a token for a row: x ≈ scale · code, scale = absmax / top.

    MXFP4 is `fp4` in groups of 32 with `e8m0` scales, NVFP4 `fp4` in groups of 16 with `e4m3` scales. Scales follow the data;
    nothing is calibrated. Where a token is int8 under one scale and the weight is integers under one scale a row, the
    product is one of integers. The gradient passes straight through.
    """
    return g.rounded(Rounding(grid, per, group, scale))


@act_quant.claim("8-bit tokens are near lossless: they cost less than a hundredth of what 4-bit tokens cost")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("act_quant", {})], baseline=[("act_quant", {"grid": "int4"})], factor=0.01)
