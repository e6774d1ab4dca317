"""Move the size of activations into the weights, so that both are easy to quantize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from weft.engine import Scale, Span, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="transport", paper="2211.10438", needs={"gram"}, on=("norm",))
def smoothquant(
    a: Span,
    *,
    alpha: Annotated[
        float, Field(ge=0, le=1, description="share of the activations' size that moves to the weights")
    ] = 0.5,
) -> Scale:
    """Divide what a norm gives by s and multiply the columns that read it: s_j = max|x_j|^alpha / max_i|w_ij|^(1 - alpha).

    The output stays as it is; int8 activations lose less after it.
    """
    most = a.seen("most").clamp(min=1e-5)
    weight = torch.stack([s.now.dense().detach().double().abs().amax(0) for s in a.readers]).amax(0).clamp(min=1e-5)
    return Scale(weight ** (1 - alpha) / most**alpha)


@smoothquant.claim("8-bit weights and static 8-bit activations lose less after it")
def claim(lab: Lab) -> Claim:
    w8a8 = [("act_quant_static", {}), ("rtn", {"bits": 8, "group": 0})]
    return lab.only("ref-lm").compare(ours=[("smoothquant", {}), *w8a8], baseline=w8a8)
