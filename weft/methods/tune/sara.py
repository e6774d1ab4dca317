"""Sparse terms of the smallest weights, of which those that are still small go on training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.expr import Expr, SparseDelta, Sum
from weft.learn.schedule import Rewrites, Schedule, Trained, untrained
from weft.linalg.masks import largest

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="schedule", rows="P148", paper="2409.06633")
def sara(
    steps: int,
    *,
    turn: Annotated[
        float, Field(gt=0, lt=1, description="share of the steps after which entries are looked at again")
    ] = 0.5,
) -> Schedule:
    """Train the k entries of each weight with the smallest |w|; after `turn` of the steps those with |w + d| above the largest of these
    |w| have become effective and stay where they are, and the others go on.

    k is the number of entries that the sparse term had. What stays is frozen, which frees its moments; at the end it is one term again.
    Departures: the paper's threshold is one for all weights, and it adds the nuclear norm of w + d at those entries, of a weight drawn
    for each step, to the loss; a schedule sees gradients and does not change them, so that there is no such penalty.
    """
    return _SaRA(steps, max(1, int(turn * steps)))


class _SaRA(Schedule):
    def __init__(self, steps: int, turn: int) -> None:
        self.steps, self.turn = steps, turn

    def begin(self, held: Sequence[Trained]) -> Rewrites:
        untrained(held)
        return {at.name: at.moved(largest(at.open(-at.weight().abs()), len(at.values))) for at in held}

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        if step == self.turn < self.steps:
            return {at.name: self._split(at) for at in held}
        return {at.name: _whole(at) for at in held if len(at.parts) > 1} if step == self.steps else {}

    def _split(self, at: Trained) -> Expr:
        """The entries that have become effective, frozen, beside those that have not."""
        places, values = at.entries(), at.values.detach()
        first = at.weight().flatten()[places]
        small = (first + values).abs() <= first.abs().max() if len(first) else first.bool()
        done = at.sparse(places[~small], values[~small], trains=False)
        return Sum({f"{at.role}-start": done, at.role: at.sparse(places[small], values[small])})


def _whole(at: Trained) -> SparseDelta:
    """All entries, as they were split."""
    parts = [e for e in at.parts.values() if isinstance(e, SparseDelta)]
    held: list[Tensor] = [torch.cat(t) for t in zip(*((e.entries(), e.values.detach()) for e in parts), strict=True)]
    return at.sparse(*held)


@sara.claim("gains at least what as many entries gain that are drawn")
def claim(lab: Lab) -> Claim:
    places = ("sparse", {"rank": 8})
    return lab.tune(ours=[places, ("sara", {})], baseline=[places], share=1.0)
