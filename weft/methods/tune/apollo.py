"""Gradients whose channels are scaled as Adam would scale them, found in a random low-rank space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.engine import method
from weft.linalg.moments import adam

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab

GROWTH = 1.01
"""What a step may be larger than the last one, at most."""


@method(kind="optimizer", paper="2412.05270")
def apollo(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="of the projection; 1, per tensor, is APOLLO-Mini")] = 32,
    per: Annotated[Literal["channel", "tensor"], Field(description="what has a scale of its own")] = "channel",
    every: Annotated[int, Field(ge=1, description="steps between new projections")] = 200,
    scale: Annotated[float, Field(gt=0, le=1e3, description="of steps; APOLLO-Mini: sqrt(128)")] = 1.0,
) -> torch.optim.Optimizer:
    """Move by the gradient G [m n] with column j times ||S_j|| / ||R_j||: R = P G [r n], S Adam's step for R, P random, N(0, 1 / r).

    Of a matrix with more rows than columns it is the other way round, so that the shorter side is projected. P is drawn anew every
    `every` steps, and moments of earlier ones are kept. per tensor: one such ratio, of the whole norms. A step is at most 1 % longer
    than the one before. Vectors, and matrices with a side not above the rank, are moved by Adam itself. Departure: P is kept
    between draws, not only its seed.
    """
    return _APOLLO(list(params.values()), lr, rank, per, every, scale)


class _APOLLO(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, rank: int, per: str, every: int, scale: float) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "per": per, "every": every, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                held, small = self.state[p], p.dim() < 2 or min(p.shape[-2:]) <= group["rank"]
                step = adam(held, p.grad) if small else _scaled(held, p.grad, group, i)
                p.add_(step, alpha=-group["lr"])
        return loss


def _scaled(held: dict[str, Any], grad: Tensor, how: dict[str, Any], number: int) -> Tensor:
    """The gradient, scaled and bounded; `number` tells this tensor's random projections from others'."""
    tall = grad.shape[-2] > grad.shape[-1]
    wide = grad.mT if tall else grad
    if held.get("step", 0) % how["every"] == 0:
        rng = torch.Generator().manual_seed(number * 1_000_003 + held.get("step", 0))
        drawn = torch.randn(how["rank"], wide.shape[-2], generator=rng) / math.sqrt(how["rank"])
        held["basis"] = drawn.to(grad)
    seen = held["basis"] @ wide
    over = (-2,) if how["per"] == "channel" else (-2, -1)
    moved = adam(held, seen)
    sizes = (moved.norm(dim=over, keepdim=True), seen.norm(dim=over, keepdim=True).clamp(min=1e-30))
    made = how["scale"] * wide * (sizes[0] / sizes[1])
    size = made.norm(dim=(-2, -1), keepdim=True)
    last = held.get("size", torch.zeros_like(size))
    most = torch.where(last > 0, GROWTH * last, size)
    made = made * (most / size.clamp(min=1e-30)).clamp(max=1)
    held["size"] = torch.minimum(size, most)
    return made.mT if tall else made


@apollo.claim("trains all weights with moments of rank 32 to at least 90 % of what AdamW gains after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("full", {}), ("apollo", {})], baseline=[("full", {})], share=0.9)


@apollo.claim(
    "with moments of rank 1 trains all weights to at least 90 % of what AdamW gains after the same steps",
    of="mini",
    paper="2412.05270",
)
def mini(lab: Lab) -> Claim:
    ours = {"rank": 1, "per": "tensor", "scale": math.sqrt(128)}
    return lab.tune(ours=[("full", {}), ("apollo", ours)], baseline=[("full", {})], share=0.9)
