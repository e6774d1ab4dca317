"""The column solver of GPTQ, SparseGPT and OBQ: settle one column at a time, push its error onto those not yet settled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from weft.error import NumericError

BLOCK = 128
PART = 16
"""Columns of a block that push their errors onto each other one by one: few enough that torch starts no threads for it."""
ROWS = 1 << 23
"""Entries of a weight that are solved at a time; rows do not depend on each other."""


def inverse_factor(gram: Float[Tensor, "n n"], damp: float, where: str) -> tuple[Float[Tensor, "n n"], float]:
    """Upper U with (G + damp · mean diag · I)^-1 = Uᵀ U, in float64, and the damping that it took.

    Inputs that never fire get a diagonal of the mean. Four tries, each with ten times the damping.
    Errors: NumericError if none gives a positive definite matrix, or the Gram is not finite.
    """
    h = gram.double().clone()
    diagonal = h.diagonal()
    mean = float(diagonal.mean())
    if not torch.isfinite(h).all():
        raise NumericError(
            "a statistic is not finite",
            where=where,
            got="NaN or infinity",
            want="finite values",
            fix="look for overflow in the inputs",
        )
    if mean <= 0:
        return torch.eye(len(h), dtype=torch.float64, device=h.device), damp
    diagonal[diagonal <= 0] = mean
    for tried in (damp, 10 * damp, 100 * damp, 1000 * damp):
        factor, failed = torch.linalg.cholesky_ex(h + tried * mean * torch.eye(len(h), dtype=h.dtype, device=h.device))
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper, tried
    raise NumericError(
        "a Gram matrix cannot be inverted",
        where=where,
        got=f"not positive definite at damping {1000 * damp:g}",
        want="a positive definite matrix",
        fix="raise damp, or use more calibration tokens",
    )


Settle = Callable[[Float[Tensor, "m"], int, slice], Float[Tensor, "m"]]


def solve(
    w: Float[Tensor, "m n"],
    upper: Float[Tensor, "n n"],
    settle: Settle,
    start: Callable[[Tensor, int, int, slice], None] | None = None,
) -> Float[Tensor, "m n"]:
    """Values after settling every column from first to last.

    settle(column, j, rows) gives what column j of these rows becomes; the error (w_j - q_j) / U_jj times U_j is taken from the
    columns to its right, lazily in blocks and parts of them. start(block values, from, to, rows) is told before each block.
    """
    out = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    factor = upper.float()
    unit = factor / factor.diagonal().unsqueeze(1)  # rows scaled to U_jj = 1
    step = max(1, ROWS // max(1, w.shape[1]))
    for i in range(0, w.shape[0], step):
        rows = slice(i, min(i + step, w.shape[0]))
        out[rows] = _solve(w[rows].to(torch.float32, copy=True).T.contiguous(), unit, settle, start, rows).T
    return out


def _solve(
    x: Float[Tensor, "n m"],
    unit: Float[Tensor, "n n"],
    settle: Settle,
    start: Callable[[Tensor, int, int, slice], None] | None,
    rows: slice,
) -> Float[Tensor, "n m"]:
    n = len(x)
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        if start is not None:
            start(x[a:b], a, b, rows)
        error = torch.empty_like(x[a:b])
        for c in range(a, b, PART):
            d = min(c + PART, b)
            for j in range(c, d):
                q = settle(x[j], j, rows)
                torch.sub(x[j], q, out=error[j - a])
                x[j] = q
                if j + 1 < d:
                    x[j + 1 : d].addr_(unit[j, j + 1 : d], error[j - a], alpha=-1)
            if d < b:
                x[d:b].addmm_(unit[c:d, d:b].T, error[c - a : d - a], alpha=-1)
        if b < n:
            x[b:].addmm_(unit[a:b, b:].T, error, alpha=-1)
    return x
