"""Low-rank factors of a weight or an error, in weight space or weighed by a Gram matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr import LowRank


def affordable(m: int, n: int, share: float) -> int:
    """The largest rank whose two factors hold at most this share of m n entries, at least 1; 0 if even those hold more than m n."""
    return max(1, int(share * m * n / (m + n))) if m + n <= m * n else 0


def truncate(error: Float[Tensor, "m n"], rank: int, dtype: torch.dtype = torch.bfloat16) -> LowRank:
    """The closest rank-r matrix in the Frobenius norm, its factors balanced and stored in `dtype`."""
    return _balanced(*_leading(error.double(), rank), dtype)


def roots(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(R, R⁺) with gram = R Rᵀ, from its eigenvectors; directions without energy are left out of R⁺. No energy at all: identities."""
    lam, q = torch.linalg.eigh(gram.double())
    root = lam.clamp(min=0).sqrt()
    keep = root > root.max() * 1e-6
    if not bool(keep.any()):
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return eye, eye
    return q * root, torch.where(keep, 1 / root.clamp(min=1e-300), 0.0)[:, None] * q.T


def whitened(
    error: Float[Tensor, "m n"],
    to: Float[Tensor, "n n"],
    back: Float[Tensor, "n n"],
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    last: bool = False,
) -> LowRank:
    """argmin over rank r of ||(error - B A) R||_F: the truncated SVD of error R, brought back by R⁺.

    `last`: the part of the smallest singular values rather than of the largest.
    """
    b, a = _leading(error.double() @ to, rank, last)
    return _balanced(b, a @ back, dtype)


def directions(
    x: Float[Tensor, "m n"], most: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r"], Float[Tensor, "n r"]]:
    """The leading singular vectors and values, so many at most, of those that are above rounding."""
    u, size, v = torch.linalg.svd(x, full_matrices=False)
    keep = min(most, int((size > size[:1] * max(x.shape) * torch.finfo(x.dtype).eps).sum()))
    return u[:, :keep], size[:keep], v[:keep].T


def isotropic(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """σ U Vᵀ of x = U S Vᵀ, in float64, over the singular values above 1e-6 of the largest, whose mean is σ."""
    wide = x.double() if x.shape[0] <= x.shape[1] else x.double().T
    lam, q = torch.linalg.eigh(wide @ wide.T)
    size = lam.clamp(min=0).sqrt()
    kept = size > size[-1:] * 1e-6
    made = (q[:, kept] * (size[kept].mean() / size[kept])) @ (q[:, kept].T @ wide)
    return made if x.shape[0] <= x.shape[1] else made.T


def _leading(
    x: Float[Tensor, "m n"], rank: int, last: bool = False
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """U Σ and Vᵀ of the leading singular values, or of the last, from eigenvectors of the smaller of x xᵀ and xᵀ x: a full SVD takes
    two to five times as long.

    Squaring loses singular values below 1e-8 of the largest: which of such directions is last is then left open.
    """
    wide = x.shape[0] < x.shape[1]
    _, q = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    q = q[:, : min(rank, len(q))] if last else q[:, -min(rank, len(q)) :].flip(1)
    return (q, q.T @ x) if wide else (x @ q, q.T)


def _balanced(b: Float[Tensor, "m r"], a: Float[Tensor, "r n"], dtype: torch.dtype = torch.bfloat16) -> LowRank:
    """b a, with factors of like size."""
    size = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return LowRank((b / size).to(dtype), (a * size[:, None]).to(dtype))
