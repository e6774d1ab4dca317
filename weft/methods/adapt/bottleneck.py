"""Bottleneck adapters, beside or behind attention and feed-forward parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model.bottleneck import Act, Bottleneck, Form, Position, bottleneck_hosts, width_of

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="branch", rows="P300 P049 P157", paper="2110.04366")
def bottleneck(
    model: Trunk,
    *,
    width: Annotated[int, Field(ge=1, le=4096, description="features inside")] = 16,
    form: Annotated[
        Form, Field(description="parallel: reads what the part reads. sequential: reads what it gives")
    ] = "parallel",
    position: Annotated[Position, Field(description="the parts it is added to")] = "ffn",
    scale: Annotated[float, Field(gt=0, le=1e3, description="what the addition is multiplied by")] = 4.0,
    act: Annotated[Act, Field(description="the function inside")] = "relu",
    splits: Annotated[
        int, Field(ge=1, le=16, description="parts of its features, of which each step of training draws one")
    ] = 1,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> list[Bottleneck]:
    """Add h <- h + s f(x W_down) W_up to what each part gives, before the sum with the stream. All weights stay frozen.

    W_up is zero at the start, so nothing changes; W_down is uniform in ±sqrt(3 / d). By default the paper's scaled parallel adapter.
    Sequential at both positions with scale 1 is Houlsby's adapter (arXiv 1902.00751), sequential at ffn with scale 1 Pfeiffer's
    (arXiv 2005.00247); with `prefix` of few tokens the default is the paper's MAM adapter. Among experts it stands around all of them.
    Departure from the paper's code: no biases, as in its formula. Where a norm stands before the part, x is behind it.
    splits (MoSA, arXiv 2312.02923): the features are split, and a step of training has one part, drawn from seed and step; all of them
    together are an ordinary adapter. A part counts `splits` times, so that its mean is their sum, which the paper leaves out, and is
    made of whole features rather than of single weights. AdamW's momentum moves the other parts on too.
    """
    d = width_of(model.model)
    if splits > width:
        model.fallback(f"{width} parts rather than {splits}: it has no more features")
    made: list[Bottleneck] = []
    for at in bottleneck_hosts(model.model, form, position):
        down = (torch.rand(width, d, generator=model.rng(f"bottleneck {name} {at}")) * 2 - 1) * math.sqrt(3 / d)
        pair = {"down": nn.Parameter(down), "up": nn.Parameter(torch.zeros(d, width))}
        made.append(Bottleneck(at=at, name=name, scale=scale, act=act, form=form, splits=min(splits, width), **pair))
    return made


@bottleneck.claim("beside feed-forward parts gains more than behind them, with as many parameters")
def claim(lab: Lab) -> Claim:
    ours, baseline = ({"form": form, "scale": 1.0} for form in ("parallel", "sequential"))
    return lab.tune(ours=[("bottleneck", ours)], baseline=[("bottleneck", baseline)], share=1.0)


@bottleneck.claim("with a few virtual tokens gains more than alone, with as many parameters", of="mam")
def mam(lab: Lab) -> Claim:
    ours = [("bottleneck", {"width": 12}), ("prefix", {"length": 8})]
    return lab.only("ref-lm").tune(ours=ours, baseline=[("bottleneck", {"width": 16})], share=1.0)


@bottleneck.claim("beside a few virtual tokens gains more than as many parameters in tokens alone", of="mam_prefix")
def mam_prefix(lab: Lab) -> Claim:
    ours = [("bottleneck", {"width": 12}), ("prefix", {"length": 8})]
    return lab.only("ref-lm").tune(ours=ours, baseline=[("prefix", {"length": 32})], share=1.0)


@bottleneck.claim("trained one of four parts at a time gains more than trained whole", of="mosa", paper="2312.02923")
def mosa(lab: Lab) -> Claim:
    return lab.tune(ours=[("bottleneck", {"splits": 4})], baseline=[("bottleneck", {})], share=1.0)


@bottleneck.claim("gains more than as many parameters in virtual keys and values", of="placement", paper="2312.03694")
def placement(lab: Lab) -> Claim:
    return lab.only("ref-lm").tune(ours=[("bottleneck", {})], baseline=[("prefix", {"length": 32})], share=1.0)
