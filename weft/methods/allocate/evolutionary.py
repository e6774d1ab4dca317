"""Spend a byte budget by trying: mutations that keep it, survivors of measured loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import Bench, method
from weft.linalg.allocation import frontier, integer

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

ROUNDS = ((2, 1 / 16), (1, 1 / 4))
"""How many children survive each round of a generation, and the share of the texts that they are measured on."""


@method(kind="search", paper="2410.14649", needs={"evaluate"})
def evolutionary(
    cost: Int[Tensor, "s c"],
    error: Float[Tensor, "s c"],
    budget: int,
    bench: Bench,
    *,
    generations: Annotated[int, Field(ge=1, le=1000, description="times that children are made and chosen from")] = 20,
    offspring: Annotated[int, Field(ge=1, le=64, description="children a generation")] = 8,
    switches: Annotated[int, Field(ge=1, le=64, description="sites that a mutation makes larger, at most")] = 3,
) -> Int[Tensor, "s"]:
    """Evolve the choice of least predicted loss, or the best one that is the same for all sites, by measured loss.

    Each child makes a few sites one level larger, and others one level smaller until the budget holds; the levels of a site are
    its candidates that cost less or err less than every other. Children are measured on few texts and their best on more,
    others each generation; the last meets the parent there. What comes out is measured against the start on all texts, so that
    it is never worse there. Departure from the paper (EvoPress): levels need not cost the same, and the start is not random.
    Errors: ConflictError with the least bytes that would do; NumericError if the start is not solved.
    """
    levels = _Levels(cost, frontier(cost, error, budget, "evolutionary"), budget)
    start = min(_starts(cost, error, budget), key=bench.evaluate)
    parent, rng = start, bench.rng("mutations")
    for generation in range(generations):
        children = [levels.mutated(parent, switches, rng) for _ in range(offspring)]
        for i, (count, share) in enumerate(ROUNDS):
            draw = len(ROUNDS) * generation + i
            if i == len(ROUNDS) - 1:
                children = [parent, *children]
            children = sorted(children, key=lambda x, share=share, draw=draw: bench.evaluate(x, share, draw))[:count]
        parent = children[0]
    return min(start, parent, key=bench.evaluate)


def _starts(cost: Int[Tensor, "s c"], error: Float[Tensor, "s c"], budget: int) -> list[Int[Tensor, "s"]]:
    """The choice of least predicted loss, then the best one that is the same for all sites, where one fits."""
    best = integer(cost, error, budget, gap=1e-4, where="evolutionary")
    total = error.double().sum(0)
    total = torch.where(total.isfinite() & (cost.sum(0) <= budget), total, torch.inf)
    same = total.argmin()
    return [best, same.expand(len(cost)).clone()] if bool(total[same].isfinite()) else [best]


class _Levels:
    """The candidates of each site by size, and mutations that keep a choice of them within the budget."""

    def __init__(self, cost: Int[Tensor, "s c"], usable: Bool[np.ndarray, "s c"], budget: int) -> None:
        self.cost, self.budget = cost, budget
        self.to = {by: _next(cost, torch.as_tensor(usable), by) for by in (1, -1)}

    def mutated(self, choice: Int[Tensor, "s"], switches: int, rng: torch.Generator) -> Int[Tensor, "s"]:
        """A child that fits; the parent itself where none was found."""
        child, free = choice.clone(), torch.ones(len(choice), dtype=torch.bool)
        for _ in range(int(torch.randint(1, switches + 1, (2,), generator=rng).min())):
            if (site := self.moved(child, 1, free, rng)) is not None:
                free[site] = False
        while int(self.cost.gather(1, child[:, None]).sum()) > self.budget:
            if self.moved(child, -1, free, rng) is None:
                return choice
        return child

    def moved(self, child: Tensor, by: int, free: Tensor, rng: torch.Generator) -> int | None:
        """Move one of the free sites a level up or down, in place: which one; None where none can."""
        to = self.to[by].gather(1, child[:, None]).flatten()
        held = torch.nonzero(free & (to != child)).flatten()
        if not len(held):
            return None
        site = int(held[torch.randint(len(held), (1,), generator=rng)])
        child[site] = to[site]
        return site


def _next(cost: Int[Tensor, "s c"], usable: Bool[Tensor, "s c"], by: int) -> Int[Tensor, "s c"]:
    """The usable candidate next in size behind each (by = 1) or before it (by = -1); itself where there is none."""
    size = by * cost
    beyond = usable[:, None] & (size[:, None] > size[:, :, None])
    best, at = torch.where(beyond, size[:, None], torch.iinfo(torch.long).max).min(2)
    return torch.where(best < torch.iinfo(torch.long).max, at, torch.arange(cost.shape[1]))


@evolutionary.claim("loses less than the knapsack of predicted losses at the same bytes")
def claim(lab: Lab) -> Claim:
    return lab.allocate(ours="evolutionary", baseline="knapsack", share=0.2, generations=6)
