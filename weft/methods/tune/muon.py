"""Momentum made orthogonal: every direction of a matrix moves alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.engine import method
from weft.linalg.moments import adam
from weft.linalg.orthogonal import orthogonal

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", paper="2502.16982")
def muon(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    momentum: Annotated[float, Field(ge=0, lt=1, description="of the gradients' running sum")] = 0.95,
) -> torch.optim.Optimizer:
    """Move a matrix by 0.2 sqrt(max(m, n)) U Vᵀ, where U S Vᵀ is its Nesterov momentum, so that a step is as large as one of AdamW.

    U Vᵀ comes from five steps of a Newton-Schulz iteration. Vectors, and stacks of matrices one by one, are moved as by AdamW and as
    matrices. Departure: the iteration runs in float32.
    """
    return _Muon(list(params.values()), lr, momentum)


class _Muon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() > 1:
                    self._matrix(p, p.grad, group)
                elif p.grad is not None:
                    p.add_(adam(self.state[p], p.grad), alpha=-group["lr"])
        return loss

    def _matrix(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        held = self.state[p].setdefault("sum", torch.zeros_like(p))
        held.mul_(group["momentum"]).add_(grad)
        turned = orthogonal(grad.add(held, alpha=group["momentum"]).float())
        p.add_(turned.to(p.dtype), alpha=-0.2 * math.sqrt(max(p.shape[-2:])) * group["lr"])


@muon.claim("all weights trained so gain more than by AdamW after the same steps, at the best of the same rates")
def claim(lab: Lab) -> Claim:
    return lab.only("ref-lm").tune(ours=[("full", {}), ("muon", {})], baseline=[("full", {})], share=1.0)
