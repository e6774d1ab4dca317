"""AdamW with a rate for each block, which falls towards the input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", paper="1801.06146")
def layerwise(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    decay: Annotated[float, Field(gt=0, le=1, description="rate of a block over that of the one above")] = 0.9,
) -> torch.optim.Optimizer:
    """Move what is k blocks below the output at decay^k times the rate: the last block and what is behind it at k = 0, embeddings lowest.

    A block is the first number in a tensor's name; names without one are before or behind the blocks as they come in the model.
    """
    numbers = {n: int(found) for n in params if (found := next((p for p in n.split(".") if p.isdigit()), ""))}
    order, top = list(params), max(numbers.values(), default=0)
    first = min((order.index(n) for n in numbers), default=len(order))
    below = {
        n: top - numbers[n] if n in numbers else (top + 1) * (i < first and bool(numbers)) for i, n in enumerate(order)
    }
    groups = [
        {"params": [params[n] for n in order if below[n] == k], "lr": lr * decay**k}
        for k in sorted(set(below.values()))
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


@layerwise.claim("full fine-tuning gains more after the same steps, at the best of the same rates")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("full", {}), ("layerwise", {})], baseline=[("full", {})], share=1.0)
