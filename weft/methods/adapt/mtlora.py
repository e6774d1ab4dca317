"""Low-rank adapters for several tasks: one that all share, and one of each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, Sum, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P310", paper="2403.20320")
def mtlora(
    g: Group,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of what all tasks share")] = 8,
    own: Annotated[int, Field(ge=1, le=4096, description="rank of what a task has of its own")] = 4,
    alpha: Annotated[float, Field(gt=0, le=1e6, description="what the products are multiplied by")] = 1.0,
    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+)*$", description="the tasks' names, with commas: an adapter each"
        ),
    ] = "default",
) -> Expr:
    """Add a trainable term for each task t, s (B A + B_t A_t), of which all tasks have the same B and A.

    B and B_t are zero at the start, so that nothing changes. Train by task (`weft.train(..., by_task=True)`), and choose one
    (`weft.activate`) or row by row (`weft.per_row`).
    Departures: every weight has both parts, which the paper splits between the layers of a vision model, and s is 1 unless told.
    """
    shared = _pair(g, rank, "mtlora")
    terms: dict[str, Expr] = {"base": g.now}
    for task in dict.fromkeys(name.split(",")):
        parts = {"base": LowRank(*shared, alpha), "adapter:own": LowRank(*_pair(g, own, f"mtlora {task}"), alpha)}
        terms[f"adapter:{task}"] = Sum(parts)
    return total(terms)


def _pair(g: Group, rank: int, salt: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Trainable factors of zero: B = 0, A uniform in ±sqrt(3 / n)."""
    m, n = g.now.shape
    a = (torch.rand(rank, n, generator=g.rng(salt)) * 2 - 1) * math.sqrt(3 / n)
    return nn.Parameter(torch.zeros(m, rank)), nn.Parameter(a)


@mtlora.claim("gains more on three tasks than one adapter of as many numbers for all")
def claim(lab: Lab) -> Claim:
    ours = ("mtlora", {"name": lab.tasks, "rank": 4, "own": 4})
    return lab.multitask(ours=[ours], baseline=[("lora", {"rank": 16})], share=1.0)
