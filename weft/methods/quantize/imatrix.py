"""Round to nearest on scales chosen by which inputs are large: an importance matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from weft.engine import Beats, Group, method
from weft.expr import Expr
from weft.linalg.grids import Fitted, nearest, refine, search
from weft.linalg.sparse import quantize_weighed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", needs={"gram"}, rowwise=True, beats=Beats("rtn", options={"bits": 3}))
def imatrix(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
) -> Expr:
    """Round to nearest on the grid of least Σ_j E[x_j²] (w_ij - q_ij)² in each group, as llama.cpp does with an importance matrix.

    Shrunken ranges are searched, then codes and their best scale and zero point are found in turns. It is GPTQ's search of scales,
    refined, without the solve behind it: no column makes up for another, so the Gram's diagonal is all it needs. A zero
    pattern stays. Departure: llama.cpp also multiplies by (mean w² + w_ij²)^1/2; the diagonal alone is the error of the output.
    """

    def round_(w: Float[Tensor, "m k"], v: Float[Tensor, "#m k"]) -> tuple[Fitted, UInt8[Tensor, "m k"]]:
        fit = refine(w, v, search(w, v, f"int{bits}", group, symmetric))
        return fit, nearest(w, fit)

    return quantize_weighed(g.now, g.second_moment().float(), round_)


@imatrix.claim("loses less than round-to-nearest at 3 bits")
def claim(lab: Lab) -> Claim:
    return lab.compare(ours=[("imatrix", {"bits": 3})], baseline=[("rtn", {"bits": 3})])
