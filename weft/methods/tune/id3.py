"""Sparse terms that begin empty and take in entries step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.learn.schedule import Rewrites, Schedule, Trained, at_least, untrained
from weft.linalg.masks import largest_together

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="schedule", rows="P391", paper="2408.14470")
def id3(
    steps: int,
    *,
    every: Annotated[int, Field(ge=2, description="steps from one choice to the next")] = 2,
    power: Annotated[float, Field(ge=0, le=4, description="of the weight's magnitude in the score")] = 1.0,
    eps: Annotated[float, Field(gt=0, le=1e3, description="what is added to that magnitude")] = 1.0,
) -> Schedule:
    """Take in the entries with the largest |g| / (|w| + eps)^power, of all weights together; none is taken out.

    The budget is the number of entries that the terms had, and choice i of n fills i / n of it, so that about half as many entries are
    moved as at places that are all there at first. Departure: the paper chooses after each step by that step's gradient. Here each weight
    nominates by the first of `every` steps as many entries as will be taken in, and the sum of the others' gradients chooses, so that no
    dense gradient is kept.
    """
    at_least(steps, every + 1, "id3")
    return _ID3(every, (steps - 1) // every, power, eps)


class _ID3(Schedule):
    def __init__(self, every: int, choices: int, power: float, eps: float) -> None:
        self.every, self.choices, self.power, self.eps = every, choices, power, eps

    def begin(self, held: Sequence[Trained]) -> Rewrites:
        untrained(held)
        budget = torch.tensor(sum(len(at.values) for at in held))
        for at in held:
            at.notes["budget"] = budget
        return {at.name: at.moved(at.entries()[:0]) for at in held}

    def watches(self, step: int) -> bool:
        return step <= self.choices * self.every

    def see(self, at: Trained, gradient: Float[Tensor, "m n"], step: int) -> None:
        if step % self.every == 1:
            score = self._score(gradient.flatten(), at.weight().flatten()).index_fill(0, at.entries(), -torch.inf)
            at.nominate(score.view(gradient.shape), self._added(at, step + self.every - 1))
        else:
            at.measure(gradient)

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        if step % self.every or not self.watches(step):
            return {}
        found = [at.measured() for at in held]
        scores = [self._score(g, at.weight().flatten()[p]) for at, (p, g) in zip(held, found, strict=True)]
        chosen = largest_together(scores, self._added(held[0], step))
        places = [p[c] for (p, _), c in zip(found, chosen, strict=True)]
        return {at.name: at.moved(torch.cat([at.entries(), p])) for at, p in zip(held, places, strict=True)}

    def _score(self, gradient: Float[Tensor, "k"], weight: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
        return gradient.abs() / (weight.abs() + self.eps) ** self.power

    def _added(self, at: Trained, step: int) -> int:
        """How many entries come in at the choice after this step."""
        budget, done = int(at.notes["budget"]), step // self.every
        return budget * done // self.choices - budget * (done - 1) // self.choices


@id3.claim("gains at least what as many entries gain that are drawn and all there from the start")
def claim(lab: Lab) -> Claim:
    places = ("sparse", {"rank": 8})
    return lab.only("ref-lm").tune(ours=[places, ("id3", {})], baseline=[places], share=1.0)
