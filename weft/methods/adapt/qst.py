"""Quantized side tuning: a narrow network beside a frozen model, which no gradient enters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Trunk, method
from weft.model import table_of
from weft.model.side import Side

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", rows="P136", paper="2401.07159")
def qst(
    model: Trunk,
    *,
    width: Annotated[int, Field(ge=1, le=4096, description="width of the side network")] = 64,
    rank: Annotated[int, Field(ge=1, le=4096, description="features that each hidden state is first brought to")] = 16,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> Side:
    """Add a narrow transformer, a block for each of the model's, that reads the model's hidden states. All weights stay frozen.

    g_i = block_i(c_i g_(i-1) + (1 - c_i) s_i), s_i = U_i gelu(D_i h_i), c_i = sigmoid(0) at first. What the head reads is
    a h + (1 - a) W g, with a = 1 at first, so that nothing changes. The states h are read without gradients: training keeps nothing
    of the model's inside, whatever its weights are stored as; `nf4` first makes it the paper's.
    Departures from the paper: the side's blocks are plain ones (norms without weights, gelu, four times the width inside), whatever
    the model's are; they have no positions of their own, which the states bring; states are normalized before they are read.
    """
    config = cast(Any, model.model).config
    table_of(model.model, type(model.model).__name__, model.at, "side network")
    layers, d = int(config.num_hidden_layers), int(config.hidden_size)

    def drawn(word: str, *size: int) -> nn.Parameter:
        shaken: Float[Tensor, "..."] = torch.rand(size, generator=model.rng(f"qst {name} {word}")) * 2 - 1
        return nn.Parameter(shaken * math.sqrt(3 / size[-1]))

    trunk = model.model.get_submodule(model.at)
    return Side(
        at=model.at, name=name, heads=math.gcd(width, int(config.num_attention_heads)),
        causal=any(bool(getattr(m, "is_causal", False)) for m in trunk.modules()),
        squeeze=drawn("squeeze", layers + 1, rank, d), lift=drawn("lift", layers + 1, width, rank),
        mix=nn.Parameter(torch.zeros(layers)), reads=drawn("reads", layers, 3, width, width),
        writes=drawn("writes", layers, width, width), inner=drawn("inner", layers, 4 * width, width),
        outer=drawn("outer", layers, width, 4 * width), widen=drawn("widen", d, width), keep=nn.Parameter(torch.ones(())),
    )  # fmt: skip


@qst.claim("beside 4-bit weights gains at least 80 % of what LoRA on them gains, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("nf4", {}), ("qst", {})], baseline=[("nf4", {}), ("lora", {})], share=0.8)
