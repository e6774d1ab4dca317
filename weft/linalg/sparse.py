"""Quantize the entries that an expression keeps: all of a dense one, the kept ones of a sparse one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from weft.expr import Expr, Masked, spread
from weft.linalg.grids import Fitted


def evened(now: Expr) -> Expr:
    """A tree with a zero pattern as one that holds its kept entries as an expression; any other as it is."""
    if not now.promises().zeros or isinstance(getattr(now, "kept", None), Expr):
        return now
    mask = now.mask()
    return now if mask is None else Masked.of(now.dense().detach(), mask)


def compact(w: Shaped[Tensor, "m n"], mask: Bool[Tensor, "m n"]) -> Shaped[Tensor, "m k"]:
    """The kept entries of each row, in order; every row keeps k."""
    return w[mask].view(mask.shape[0], -1)


def expand(
    per_group: Float[Tensor, "m g"], group: int, n: int, mask: Bool[Tensor, "m n"] | None
) -> Float[Tensor, "m n"]:
    """One value a group of kept entries, at every column; where nothing is kept, that of the group before."""
    if mask is None:
        return spread(per_group, group, n)
    rank = (mask.cumsum(1) - 1).clamp(min=0)
    return per_group.gather(1, rank // group if group else torch.zeros_like(rank))


Round = Callable[[Float[Tensor, "m k"]], tuple[Fitted, UInt8[Tensor, "m k"]]]


def quantize(now: Expr, round_: Round) -> Expr:
    """`now` with its values on the grid that `round_` fits to them; a zero pattern stays."""
    kept = getattr(now, "kept", None)
    if isinstance(kept, Expr):
        return now.rebuild(kept=quantize(kept, round_))
    fit, codes = round_(now.dense())
    return fit.encode(codes)


Weighed = Callable[[Float[Tensor, "m k"], Float[Tensor, "#m k"]], tuple[Fitted, UInt8[Tensor, "m k"]]]


def quantize_weighed(now: Expr, weight: Float[Tensor, "n"], round_: Weighed) -> Expr:
    """`quantize` for a `round_` that is also given how much each entry counts, which is a number a column."""
    mask, w, v = now.mask(), now.dense().float(), weight[None]
    fit, codes = round_(w, v) if mask is None else round_(compact(w, mask), compact(v.expand(w.shape), mask))
    made = fit.encode(codes)
    return made if mask is None else now.rebuild(kept=made)
