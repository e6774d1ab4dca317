"""AdamW with a higher rate for the second factor of low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", paper="2402.12354")
def lora_plus(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    ratio: Annotated[float, Field(gt=0, le=1e4, description="rate of B over that of A and all others")] = 16.0,
) -> torch.optim.Optimizer:
    """Train B of every low-rank term B A at `ratio` times the rate: as the width grows, at one rate for both A hardly moves the output."""
    fast = [p for name, p in params.items() if name.endswith(".b")]
    slow = [p for name, p in params.items() if not name.endswith(".b")]
    groups = [{"params": slow, "lr": lr}, {"params": fast, "lr": ratio * lr}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=0.0)


@lora_plus.claim("rank 16 gains more after the same steps, at the best of the same rates")
def claim(lab: Lab) -> Claim:
    adapter = ("lora", {"rank": 16})
    return lab.tune(ours=[adapter, ("lora_plus", {})], baseline=[adapter], share=1.0)
