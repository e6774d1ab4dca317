"""Train weights and the steps of their grid through rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr
from weft.expr.softquantized import SoftQuantized
from weft.linalg.grids import search
from weft.linalg.sparse import grid_of, kept

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="relax", paper="1902.08153")
def lsq(
    g: Group,
    *,
    bits: Annotated[int, Field(ge=2, le=8, description="bits per weight", json_schema_extra={"better": "up"})] = 4,
    group: Annotated[int, Field(ge=0, le=65536, description="columns per step; 0: the whole row")] = 64,
) -> Expr:
    """Learned step size quantization: W and a step s a group train, and the model runs with s clamp(round(W / s), ...).

    The gradient of W passes straight through the rounding, but not where W is outside the range; that of s is round(W / s) - W / s, or the
    end of the range, times 1 / sqrt(entries of the group · (2^(bits-1) - 1)). Hardened (`weft.harden`; `weft train` does) the weight is
    packed, with the value that it trained with. A zero pattern stays; a weight that is on such a grid already begins as it is.
    Departures from the paper: steps begin where they round W with the least error, are one a group rather than a layer, and are rounded to
    bfloat16 as they will be stored; inputs are not rounded.
    """
    grid, has = f"int{bits}", grid_of(g.now)
    alike = has is not None and (has.grid, has.group, has.symmetric, has.scale) == (grid, group, True, "bf16")

    def soft(w: torch.Tensor) -> Expr:
        w = w.detach().float()
        steps = (
            has.scales() if has is not None and alike else search(w, torch.ones_like(w[:1]), grid, group, True).scales
        )
        return SoftQuantized(nn.Parameter(w.clone()), nn.Parameter(steps.clone()), bits, group)

    return kept(g.now, soft)


@lsq.claim("from what GPTQ leaves at 3 bits, after some steps towards the original's outputs, loses less than that")
def claim(lab: Lab) -> Claim:
    start = [("gptq", {"bits": 3})]
    return lab.restore(ours=[*start, ("lsq", {"bits": 3}), ("distill", {})], baseline=start)


@lsq.claim("at 2 bits, after the same steps, loses less than an adapter beside rounded weights", of="lora")
def lora(lab: Lab) -> Claim:
    ours, beside = [("lsq", {"bits": 2})], [("rtn", {"bits": 2}), ("lora", {"rank": 16})]
    return lab.restore(ours=[*ours, ("distill", {})], baseline=[*beside, ("distill", {})])
