"""Adam's step, for the optimizers that take it of a whole gradient or of a part of it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
"""What Adam's moments keep of themselves a step, and what is added to their root."""


def adam(held: dict[str, Any], grad: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """mean / (sqrt(square) + eps), of the gradients so far, corrected for their start; `held` has both moments and a count of steps."""
    low, high = BETAS
    done = held["step"] = held.get("step", 0) + 1
    mean, square = (held.setdefault(name, torch.zeros_like(grad)) for name in ("mean", "square"))
    mean.lerp_(grad, 1 - low)
    square.mul_(high).addcmul_(grad, grad, value=1 - high)
    return mean / (1 - low**done) / (square / (1 - high**done)).sqrt_().add_(EPS)
