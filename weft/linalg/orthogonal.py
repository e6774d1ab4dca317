"""The orthogonal part of a matrix, by products alone."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def orthogonal(x: Float[Tensor, "*e m n"], least: float = 1e-15) -> Float[Tensor, "*e m n"]:
    """About U Vᵀ of x = U S Vᵀ: singular values between 0.7 and 1.2; zero for zero. Norms below `least`
    count as that; those of float32 below 1e-15 may have squares that it cannot hold.

    Five steps of a Newton-Schulz iteration, whose gradient exists everywhere.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=least)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return y.mT if tall else y
