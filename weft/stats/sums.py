"""Plain sums over tokens, and the largest size: they merge over batches, data sets and resumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """In float64; in float32 on Apple's GPUs, which have no float64."""
    return t.double() if t.device.type != "mps" else t.float()


@dataclass
class InputSums:
    """What one input edge of n features has seen. Sums in float64, each batch's Gram in float32."""

    tokens: int
    gram: Float[Tensor, "n n"]
    total: Float[Tensor, "n"]
    total_abs: Float[Tensor, "n"]
    most: Float[Tensor, "n"]
    """The largest |x|."""

    @classmethod
    def zero(cls, n: int, device: torch.device) -> Self:
        """Nothing seen."""
        return cls(0, wide(torch.zeros(n, n, device=device)), *(wide(torch.zeros(n, device=device)) for _ in range(3)))

    def add(self, x: Float[Tensor, "t n"]) -> bool:
        """Add the tokens x. False, and nothing is added, if an entry is not finite or sums of squares overflow float32."""
        x = x.float()
        gram = x.T @ x
        if not bool(torch.isfinite(gram.diagonal()).all()):
            return False
        self.tokens += x.shape[0]
        self.gram += gram
        self.total += x.sum(0)
        self.total_abs += x.abs().sum(0)
        self.most = torch.maximum(self.most, x.abs().amax(0).to(self.most)) if len(x) else self.most
        return True


@dataclass
class OutputSums:
    """Squared output gradients of one use of a weight; for an embedding their Gram, and how often each row was looked up."""

    squares: Float[Tensor, "m"] | None = None
    gram: Float[Tensor, "n n"] | None = None
    counts: Float[Tensor, "m"] | None = None
