"""Sparse terms at the places that a full training moves most, trained again from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import method
from weft.expr import Dense
from weft.learn.schedule import Rewrites, Schedule, Trained, at_least, untrained
from weft.linalg.masks import largest_together

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="schedule", rows="P069", paper="2110.07560")
def lt_sft(
    steps: int,
    *,
    full: Annotated[float, Field(gt=0, lt=1, description="share of the steps that all entries train in")] = 0.5,
) -> Schedule:
    """Train all of d in W + d; keep the K entries of the largest |d|, of all weights together, put them back to zero and train them alone.

    K is the number of entries that the sparse terms had. Until the turn d is a dense matrix beside each weight, so that memory is that of
    full training: in float32 16 bytes an entry, with its gradient and AdamW's moments. Terms of two trainings add up: W + d + e.
    Departures: the rate goes on along its schedule and does not start again; there is no pull of the full phase towards zero.
    """
    at_least(steps, 2, "lt_sft")
    return _LTSFT(max(1, int(full * steps)))


class _LTSFT(Schedule):
    def __init__(self, turn: int) -> None:
        self.turn = turn

    def begin(self, held: Sequence[Trained]) -> Rewrites:
        untrained(held)
        for at in held:
            at.notes["budget"] = torch.tensor(len(at.values))
        return {at.name: Dense(nn.Parameter(at.values.new_zeros(at.term.shape))) for at in held}

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        if step != self.turn:
            return {}
        budget = sum(int(at.notes.pop("budget")) for at in held)
        chosen = largest_together([at.open(at.values.detach().abs()) for at in held], budget)
        return {at.name: at.sparse(p, at.values.new_zeros(len(p))) for at, p in zip(held, chosen, strict=True)}


@lt_sft.claim("gains at least what as many entries gain that are drawn and train all the time")
def claim(lab: Lab) -> Claim:
    places = ("sparse", {"rank": 8})
    return lab.tune(ours=[places, ("lt_sft", {})], baseline=[places], share=1.0)
