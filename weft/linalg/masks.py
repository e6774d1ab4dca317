"""Choose which entries of a weight stay: the best of each row, or the best N of every M."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weft.error import OptionError
from weft.expr import NM, Expr, Masked

PATTERNS = ("row", "2:4", "4:8")


def best(score: Float[Tensor, "m n"], pattern: str, sparsity: float, where: str) -> Bool[Tensor, "m n"]:
    """Mask of the highest scores: all but floor(sparsity n) of each row, or N of every M columns.

    Errors: OptionError if M does not divide n.
    """
    m, n = score.shape
    if pattern == "row":
        keep = n - int(sparsity * n)
        order = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
        return torch.zeros(m, n, dtype=torch.bool, device=score.device).scatter_(1, order, True)
    keep, of = map(int, pattern.split(":"))
    if n % of:
        raise OptionError(
            "this pattern does not fit the weight",
            where=where,
            got=f"{n} columns",
            want=f"a multiple of {of}",
            fix="use pattern=row, or leave the site out",
        )
    order = score.view(m, -1, of).argsort(dim=2, descending=True, stable=True)[..., :keep]
    return torch.zeros(m, n // of, of, dtype=torch.bool, device=score.device).scatter_(2, order, True).view(m, n)


def sparse(value: Float[Tensor, "m n"], mask: Bool[Tensor, "m n"], pattern: str) -> Expr:
    """The expression that keeps `value` where `mask`."""
    if pattern == "row":
        return Masked.of(value, mask)
    return NM.of(value, mask, *map(int, pattern.split(":")))
