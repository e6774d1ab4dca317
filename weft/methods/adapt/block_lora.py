"""Low-rank adapters of blocks that share their down-projection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P444")
def block_lora(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of a block, and so of the adapter")] = 4,
    blocks: Annotated[int, Field(ge=1, le=1024, description="blocks of B, which are summed")] = 2,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add a trainable term (B_1 + ... + B_blocks) A in float32: LoRA of rank `blocks` times `rank` whose blocks of A are tied to one.

    All blocks start at zero and have the same gradient, that of their sum, so that they stay equal: the term is `blocks` B A, of one
    block B that is stored once. It has LoRA's capacity at `rank`, not at that of all blocks, and differs from it only in its rate:
    under Adam, of which a gradient's scale is no matter, B moves it `blocks` times as fast. The same is `lora` with alpha = `blocks`.
    A starts uniform in ±sqrt(3 / n). Departures: blocks are not kept apart; dropout is left to the model.
    """
    m, n = g.now.shape
    a = (torch.rand(rank, n, generator=g.rng(f"block_lora {name}")) * 2 - 1) * math.sqrt(3 / n)
    term = LowRank(nn.Parameter(torch.zeros(m, rank)), nn.Parameter(a), float(blocks))
    return total({"base": g.now, f"adapter:{name}": term})


@block_lora.claim("two blocks of rank 8 reach at least 95 % of what LoRA of rank 16 gains, with half of its parameters")
def claim(lab: Lab) -> Claim:
    ours = {"rank": 8, "blocks": 2}
    return lab.tune(ours=[("block_lora", ours)], baseline=[("lora", {"rank": 16})], share=0.95)
