"""LoFiT: offsets at the outputs of a few attention heads, chosen by scales that were trained first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from weft.engine import Trunk, method
from weft.model import branches
from weft.model.heads import Heads, head_hosts

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

SPREAD = 1e-3
"""Standard deviation of what vectors begin with."""
PENALTY = 5e-4
"""Weight of the scales' L1 norm."""
Head = tuple[str, int]
"""A head: the module that mixes it, and its number there."""


@method(kind="branch", rows="P164", paper="2406.01563")
def lofit(
    model: Trunk,
    *,
    stage: Annotated[
        Literal["offsets", "scales"],
        Field(description="scales: at every head, to choose heads by. offsets: at the chosen heads"),
    ] = "offsets",
    share: Annotated[float, Field(gt=0, le=1, description="share of all heads that have offsets")] = 0.1,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its name")] = "default",
) -> list[Heads]:
    """Edit what attention heads give, before they are mixed. All weights stay frozen.

    The paper's two stages are two calls, each followed by training; the first's scales are taken off before the second training:
    `apply(model, "lofit", stage="scales", name="scales")`, then `apply(model, "lofit")` and `unbranch(model, "scales")`.
    scales: z (1 + a), with 5e-4 |a| in the loss, by its gradient. offsets: z + v at the heads whose ||a|| are the largest, of all
    scales on the model. Without scales heads are drawn, which is declared: the paper's baseline. Vectors begin normal, of
    deviation 0.001, so that the output is nearly what it was.
    """
    hosts = head_hosts(model.model)
    heads: list[Head] = [(at, i) for at, (count, _) in hosts.items() for i in range(count)]
    if stage == "offsets":
        heads = _best(model, heads, max(1, round(share * len(heads))), name)
    made: list[Heads] = []
    for at in dict.fromkeys(at for at, _ in heads):
        mine = sorted(i for place, i in heads if place == at)
        drawn = SPREAD * torch.randn(len(mine), hosts[at][1], generator=model.rng(f"lofit {name} {at}"))
        how = ("offset", 0.0) if stage == "offsets" else ("scale", PENALTY)
        words = " ".join(map(str, mine))
        made.append(Heads(at=at, name=name, vectors=nn.Parameter(drawn), heads=words, edit=how[0], penalty=how[1]))
    return made


def _best(model: Trunk, heads: list[Head], count: int, name: str) -> list[Head]:
    """So many heads, those whose scales are the longest, in the model's order; some that are drawn, where no scales are."""
    score: dict[Head, float] = {}
    for b in branches(model.model):
        if isinstance(b, Heads) and b.edit == "scale":
            lengths = b.vectors.detach().float().norm(dim=1).tolist()
            for i, length in zip(b.numbers_of_heads, lengths, strict=True):
                score[b.at, i] = score.get((b.at, i), 0.0) + length
    if score:
        best = set(sorted(score, key=lambda h: -score[h])[:count])
    else:
        model.fallback("no scales are there to choose heads by: they are drawn")
        order = torch.randperm(len(heads), generator=model.rng(f"lofit {name}"))
        best = {heads[i] for i in order[:count].tolist()}
    return [h for h in heads if h in best]


@lofit.claim("vectors at heads' outputs, at all of them, gain at least 80 % of what LoRA gains, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("lofit", {"share": 1.0})], baseline=[("lora", {})], share=0.8)
