"""Choose which entries of a weight stay: the best of each row, or the best N of every M."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
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


def largest(score: Float[Tensor, "k"], count: int) -> Int[Tensor, "c"]:
    """The places of the highest scores, ascending; of equal ones the first. What scores minus infinity is none of them."""
    count = min(count, int((score > -torch.inf).sum()))
    if count <= 0:
        return torch.empty(0, dtype=torch.long, device=score.device)
    return _first(score, score.topk(count).values[-1], count)


def largest_together(scores: Sequence[Float[Tensor, "_"]], count: int) -> list[Int[Tensor, "_"]]:
    """The places of the highest scores in all of several tensors together, as `largest` chooses in one; float32, and none below zero
    but minus infinity, which is never chosen.

    The least score that is taken is found by bisection of the numbers' bits, so that nothing is copied.
    """
    count = min(count, sum(int((s >= 0).sum()) for s in scores))
    low, high = (
        0,
        torch.tensor(torch.inf).view(torch.int32).item(),
    )  # the order of floats from zero on is that of their bits
    while low < high:
        middle = (low + high + 1) // 2
        least = torch.tensor(middle, dtype=torch.int32).view(torch.float32).item()
        low, high = (middle, high) if sum(int((s >= least).sum()) for s in scores) >= count else (low, middle - 1)
    least = torch.tensor(low, dtype=torch.int32).view(torch.float32)
    made: list[Tensor] = []
    rest = count - sum(int((s > least.to(s.device)).sum()) for s in scores)
    for s in scores:
        above = int((s > least.to(s.device)).sum())
        equal = min(rest, int((s == least.to(s.device)).sum()))
        made.append(_first(s, least.to(s.device), above + equal))
        rest -= equal
    return made


def _first(score: Float[Tensor, "k"], least: Float[Tensor, ""], count: int) -> Int[Tensor, "c"]:
    """The places above `least`, and so many of those that equal it, the first ones, that they are `count`."""
    chosen = score > least
    ties = (score == least).nonzero().flatten()[: count - int(chosen.sum())]
    chosen[ties] = True
    return chosen.nonzero().flatten()
