"""Low-rank factors of an error, in weight space or weighed by a Gram matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr import LowRank


def truncate(error: Float[Tensor, "m n"], rank: int) -> LowRank:
    """The closest rank-r matrix in the Frobenius norm, its factors balanced and stored in bfloat16."""
    u, s, vh = torch.linalg.svd(error.double(), full_matrices=False)
    return _factors(u, s, vh, rank)


def roots(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(R, R⁺) with gram = R Rᵀ, from its eigenvectors; directions without energy are left out of R⁺. No energy at all: identities."""
    lam, q = torch.linalg.eigh(gram.double())
    root = lam.clamp(min=0).sqrt()
    keep = root > root.max() * 1e-6
    if not bool(keep.any()):
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return eye, eye
    return q * root, torch.where(keep, 1 / root.clamp(min=1e-300), 0.0)[:, None] * q.T


def whitened(error: Float[Tensor, "m n"], to: Float[Tensor, "n n"], back: Float[Tensor, "n n"], rank: int) -> LowRank:
    """argmin over rank r of ||(error - B A) R||_F: the truncated SVD of error R, brought back by R⁺."""
    u, s, vh = torch.linalg.svd(error.double() @ to, full_matrices=False)
    return _factors(u, s, vh, rank, back)


def _factors(u: Tensor, s: Tensor, vh: Tensor, rank: int, back: Tensor | None = None) -> LowRank:
    r = min(rank, len(s))
    b, a = u[:, :r] * s[:r], vh[:r] if back is None else vh[:r] @ back
    size = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return LowRank((b / size).to(torch.bfloat16), (a * size[:, None]).to(torch.bfloat16))
