"""Scale up the columns that matter before rounding, and fold the inverse into what feeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import Scale, Span, method
from weft.expr import Quantized
from weft.linalg.grids import minmax, nearest

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="transport", paper="2306.00978", needs={"gram"}, on=("norm", "value", "feed"))
def awq(
    a: Span,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight of the rounding to come")] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="its columns per scale; 0: the whole row")] = 64,
    symmetric: Annotated[bool, Field(description="no zero point")] = True,
    steps: Annotated[int, Field(ge=1, le=100, description="exponents tried between 0 and 1")] = 20,
) -> Scale:
    """Multiply the columns of all readers by s_j = E|x_j|^t, and divide what feeds them, for the t in [0, 1) of least rounding error.

    The error is Σ_i weight_i e_i G e_iᵀ with e = Q(w s) / s - w. The output stays as it is; round afterwards, to the same grid.
    Departure from the paper: errors are weighed by the Gram and the output gradients rather than measured on samples, and
    axes share their scales among query heads.
    """
    size = a.seen("mean_abs").clamp(min=1e-8)
    best, chosen = torch.inf, torch.ones_like(size)
    for step in range(steps):
        s = size ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        if (found := _error(a, a.columns(s).float(), bits, group, symmetric)) < best:
            best, chosen = found, s
    return Scale(1 / chosen)


def _error(a: Span, s: Float[Tensor, "n"], bits: int, group: int, symmetric: bool) -> float:
    """What rounding the readers costs when their columns are scaled by s."""
    total = 0.0
    for site in a.readers:
        for part in site.slices():
            w = part.now.dense().detach().float()
            fit = minmax(w * s, f"int{bits}", group, symmetric)
            codes = nearest(w * s, fit)
            e = Quantized.encode(codes, fit.scales, fit.zeros, grid=fit.name, group=group).dense() / s - w
            for seen in part.evidence:
                total += float(((e @ seen.gram.float()) * e).sum(1).double().clamp(min=0) @ seen.weight.double())
    return total


@awq.claim("3-bit rounding loses less after it")
def claim(lab: Lab) -> Claim:
    rounding = ("rtn", {"bits": 3, "symmetric": False})
    ours = [("awq", {"bits": 3, "symmetric": False}), rounding]
    return lab.only("ref-lm").compare(ours=ours, baseline=[rounding])
