"""Adam whose moments live in a low-rank projection of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import method
from weft.linalg.moments import adam

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", paper="2403.03507")
def galore(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    rank: Annotated[int, Field(ge=1, le=4096, description="of the projection")] = 32,
    every: Annotated[int, Field(ge=1, description="steps between new projections")] = 200,
    scale: Annotated[float, Field(gt=0, le=1e3, description="of steps in the projection")] = 1.0,
) -> torch.optim.Optimizer:
    """Keep Adam's moments of R = Pᵀ G [r n], P the leading left singular vectors of the gradient G [m n], and move by P times R's step.

    Of a matrix with more rows than columns it is the other way round, so that the shorter side is projected. P is made anew every
    `every` steps. Vectors, and matrices with a side not above the rank, are moved by Adam itself. Departure: `scale` is 1, and its
    place the learning rate.
    """
    return _GaLore(list(params.values()), lr, rank, every, scale)


class _GaLore(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, rank: int, every: int, scale: float) -> None:
        super().__init__(params, {"lr": lr, "rank": rank, "every": every, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)
        return loss

    def _move(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        held = self.state[p]
        small = p.dim() < 2 or min(p.shape[-2:]) <= group["rank"]
        tall = not small and p.shape[-2] > p.shape[-1]
        if not small and held.get("step", 0) % group["every"] == 0:
            held["basis"] = _leading(grad.mT if tall else grad, group["rank"])
        step = adam(held, grad if small else (held["basis"].mT @ (grad.mT if tall else grad)))
        if not small:
            step = group["scale"] * held["basis"] @ step
        p.add_(step.mT if tall else step, alpha=-group["lr"])


def _leading(x: Float[Tensor, "*e m n"], rank: int) -> Float[Tensor, "*e m r"]:
    """The leading left singular vectors."""
    u, _, _ = torch.linalg.svd(x.float(), full_matrices=False)
    return u[..., :rank].to(x.dtype)


@galore.claim("trains all weights with moments of rank 32 to at least 80 % of what AdamW gains after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("full", {}), ("galore", {})], baseline=[("full", {})], share=0.8)
