"""What the API suites share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import weft
from weft.expr import LowRank, Sum


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adapters as if they had been trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for expr in weft.expressions(model).values():
            for term in expr.named().values() if isinstance(expr, Sum) else ():
                if isinstance(term, LowRank) and term.b.requires_grad:
                    term.b.copy_(torch.randn(term.b.shape, generator=rng) * 0.05)
    return model


def logits(model: nn.Module) -> Tensor:
    """Of fixed tokens."""
    with torch.no_grad():
        return model(torch.arange(2, 32).view(3, 10)).logits.float()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every weight's value."""
    return {n: e.dense().detach() for n, e in weft.expressions(model).items()}
