"""Sparse terms that drop the entries that changed least and grow others, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.expr import SparseDelta
from weft.learn.schedule import Rewrites, Schedule, Trained
from weft.linalg.masks import largest

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="schedule", rows="P068", paper="2401.16405")
def spiel(
    steps: int,
    *,
    every: Annotated[int, Field(ge=2, description="steps from one choice of places to the next")] = 20,
    over: Annotated[int, Field(ge=1, description="steps that the gradients of candidates are added up over")] = 4,
    share: Annotated[
        float, Field(gt=0, le=1, description="of the entries dropped at first; falls to 0 at the end")
    ] = 0.2,
    by: Annotated[
        Literal["gradient", "momentum"],
        Field(description="what grows: the largest sums of gradients, or SM3's estimates"),
    ] = "gradient",
) -> Schedule:
    """Drop share (1 - step / steps) k of the k entries of each sparse term, those of smallest |value|, and grow as many, from zero;
    the first time all.

    gradient (SpIEL-AG): the k entries with the largest |g| in one step are candidates, Σ g over the next ones chooses. momentum
    (SpIEL-MA): the largest r_i c_j, with v_ij = min(r_i, c_j) + g_ij² of what trains, r_i = max_j v_ij and c_j = max_i v_ij; no other
    gradients are computed. Departure: new entries begin with zero moments at the run's count of steps, so that in long runs AdamW's first
    steps of them are longer than of others. Between choices there are at least `over` + 1 steps.
    """
    return _SpIEL(steps, max(every, over + 1), over, share, by == "momentum")


class _SpIEL(Schedule):
    def __init__(self, steps: int, every: int, over: int, share: float, estimates: bool) -> None:
        self.steps, self.every, self.over, self.share, self.estimates = steps, every, over, share, estimates

    def watches(self, step: int) -> bool:
        return not self.estimates and (step - 1) % self.every <= self.over

    def see(self, at: Trained, gradient: Float[Tensor, "m n"], step: int) -> None:
        if (step - 1) % self.every:
            at.measure(gradient)
        else:
            at.nominate(gradient.abs(), len(at.values))

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        if self.estimates:
            for at in held:
                _sm3(at)
        if (step - 1) % self.every != self.over or step >= self.steps:
            return {}
        share = 1.0 if step <= self.every else self.share * (1 - step / self.steps)
        return {at.name: self._chosen(at, int(share * len(at.values))) for at in held}

    def _chosen(self, at: Trained, count: int) -> SparseDelta:
        """The term with `count` entries dropped and as many grown; fewer where there are fewer candidates."""
        if self.estimates:
            score = at.open(at.notes["rows"].outer(at.notes["columns"]))
            places = torch.arange(len(score), device=score.device)
        else:
            places, sums = at.measured()
            score = sums.abs()
        held, size = at.entries(), at.values.abs()
        stays = held[largest(size, len(held) - count)]
        free = score.new_ones(at.term.shape, dtype=torch.bool).flatten().index_fill(0, stays, False)
        grown = places[largest(score.where(free[places], -torch.inf), count)]
        rest = ~torch.isin(held, torch.cat([stays, grown]))
        filled = held[rest][largest(size[rest], len(held) - len(stays) - len(grown))]
        return at.moved(torch.cat([stays, grown, filled]))


def _sm3(at: Trained) -> None:
    """Take the gradients of a step into a term's `rows` and `columns`."""
    (m, n), places, grad = at.term.shape, at.entries(), at.values.grad
    rows, columns = (at.notes.get(k, at.values.new_zeros(size)) for k, size in (("rows", m), ("columns", n)))
    seen = torch.minimum(rows[places // n], columns[places % n]) + (grad.square() if grad is not None else 0)
    at.notes["rows"] = torch.zeros_like(rows).scatter_reduce(0, places // n, seen, "amax")
    at.notes["columns"] = torch.zeros_like(columns).scatter_reduce(0, places % n, seen, "amax")


@spiel.claim("with as many parameters gains more than places that stay where they were drawn")
def claim(lab: Lab) -> Claim:
    places = ("sparse", {"rank": 8})
    return lab.tune(ours=[places, ("spiel", {"every": 5, "over": 2})], baseline=[places], share=1.0)
