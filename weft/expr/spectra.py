"""Matrices of a few waves, by fast Fourier transforms."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def fourier(c: Float[Tensor, "k"], p: Int[Tensor, "k"], q: Int[Tensor, "k"], m: int, n: int) -> Float[Tensor, "m n"]:
    """Σ_k c[k] cos(2π (p[k] i / m + q[k] j / n)), the real part of m n times the inverse transform of the spectrum."""
    return torch.fft.ifft2(_spectrum(c, p, q, m, n), norm="forward").real


def cosine(c: Float[Tensor, "k"], p: Int[Tensor, "k"], q: Int[Tensor, "k"], m: int, n: int) -> Float[Tensor, "m n"]:
    """Σ_k c[k] cos(π (i + ½) p[k] / m) cos(π (j + ½) q[k] / n), a transform along either side."""
    return _cosines(_cosines(_spectrum(c, p, q, m, n)).T).T


def _spectrum(c: Tensor, p: Tensor, q: Tensor, m: int, n: int) -> Float[Tensor, "m n"]:
    at = p.to(torch.int64) * n + q.to(torch.int64)
    return c.new_zeros(m * n).index_add(0, at, c).view(m, n)


def _cosines(rows: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
    """Σ_f x[f] cos(π (i + ½) f / n) of every row x: the real part of an inverse transform of twice the length, turned by half a place."""
    n = rows.shape[1]
    turn = torch.arange(n, dtype=torch.float64, device=rows.device) * (math.pi / (2 * max(1, n)))
    turned = rows * torch.polar(torch.ones_like(turn), turn).to(rows.dtype.to_complex())
    return torch.fft.ifft(turned, 2 * n, norm="forward").real[:, :n]
