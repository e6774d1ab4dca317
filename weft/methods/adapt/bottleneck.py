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


@method(kind="branch", rows="P300", paper="2110.04366")
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
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> list[Bottleneck]:
    """Add h <- h + s f(x W_down) W_up to what each part gives, before the sum with the stream. All weights stay frozen.

    W_up is zero at the start, so nothing changes; W_down is uniform in ±sqrt(3 / d). By default the paper's scaled parallel adapter.
    Sequential at both positions with scale 1 is Houlsby's adapter (arXiv 1902.00751), sequential at ffn with scale 1 Pfeiffer's
    (arXiv 2005.00247); with `prefix` of few tokens the default is the paper's MAM adapter. Among experts it stands around all of them.
    Departure from the paper's code: no biases, as in its formula. Where a norm stands before the part, x is behind it.
    """
    d = width_of(model.model)
    made: list[Bottleneck] = []
    for at in bottleneck_hosts(model.model, form, position):
        down = (torch.rand(width, d, generator=model.rng(f"bottleneck {name} {at}")) * 2 - 1) * math.sqrt(3 / d)
        pair = {"down": nn.Parameter(down), "up": nn.Parameter(torch.zeros(d, width))}
        made.append(Bottleneck(at=at, name=name, scale=scale, act=act, form=form, **pair))
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
