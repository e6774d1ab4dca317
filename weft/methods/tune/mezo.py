"""Steps from losses alone, along random directions: no backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.engine import method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="optimizer", rows="P374", paper="2305.17333")
def mezo(
    params: Mapping[str, nn.Parameter],
    lr: float,
    *,
    eps: Annotated[float, Field(gt=0, le=1, description="how far to either side losses are taken")] = 1e-3,
) -> torch.optim.Optimizer:
    """Move by -rate (L(w + eps z) - L(w - eps z)) / (2 eps) z, with z from N(0, 1) anew each step: two forward passes, no gradient.

    z is drawn again whenever it is needed, from the run's seed and the number of the step, so that memory is that of inference. Both
    losses are of the same batch under the same dropout. Tensors go to either side and back in place, which changes their last
    bits. `clip` bounds gradients, and so nothing here. It takes many times the steps of AdamW.
    """
    return _MeZO(list(params.values()), lr, eps)


class _MeZO(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "done": 0})
        self.slope = 0.0

    @torch.no_grad()
    def measure(self, loss: Callable[[], Tensor]) -> Tensor:
        """Take the loss on both sides, for `step` to go by, and return their mean; once for every part of the step's batch."""
        eps = self.param_groups[0]["eps"]
        self._shift(eps)
        with torch.random.fork_rng({p.device for p in self._all() if p.device.type == "cuda"}):
            above = loss()
        self._shift(-2 * eps)
        below = loss()
        self._shift(eps)
        self.slope += float(above - below) / (2 * eps)
        return (above + below) / 2

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.measure(closure) if closure is not None else None
        self._shift(-self.param_groups[0]["lr"] * self.slope)
        self.param_groups[0]["done"] += 1
        self.slope = 0.0
        return loss

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _shift(self, by: float) -> None:
        """Add so much of this step's z to the tensors."""
        seed = (torch.initial_seed() * 1_000_003 + self.param_groups[0]["done"]) % (1 << 63)
        draws = {p.device: torch.Generator(p.device).manual_seed(seed) for p in self._all()}
        for p in self._all():
            p.add_(torch.randn(p.shape, generator=draws[p.device], device=p.device, dtype=p.dtype), alpha=by)


@mezo.claim("from losses alone an adapter of rank 16 gains more than nothing in as few steps as AdamW's")
def claim(lab: Lab) -> Claim:
    adapter = ("lora", {"rank": 16})
    return lab.tune(ours=[adapter, ("mezo", {})], baseline=[adapter], share=0.0)
