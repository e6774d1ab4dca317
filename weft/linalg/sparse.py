"""Quantize the entries that an expression keeps, on a grid of choice or on its own: all of a dense one, the kept ones of a sparse one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from weft.expr import Expr, Masked, Quantized, spread
from weft.linalg.grids import Fitted, grouped, nearest, search


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


def kept(now: Expr, make: Callable[[Float[Tensor, "m k"]], Expr]) -> Expr:
    """`now` with what `make` gives of the entries that it keeps; a zero pattern stays."""
    inner = getattr(now, "kept", None)
    return now.rebuild(kept=kept(inner, make)) if isinstance(inner, Expr) else make(now.dense())


Round = Callable[[Float[Tensor, "m k"]], tuple[Fitted, UInt8[Tensor, "m k"]]]


def quantize(now: Expr, round_: Round) -> Expr:
    """`now` with its values on the grid that `round_` fits to them; a zero pattern stays."""

    def rounded(w: Float[Tensor, "m k"]) -> Expr:
        fit, codes = round_(w)
        return fit.encode(codes)

    return kept(now, rounded)


Weighed = Callable[[Float[Tensor, "m k"], Float[Tensor, "#m k"]], tuple[Fitted, UInt8[Tensor, "m k"]]]


def quantize_weighed(now: Expr, weight: Float[Tensor, "n"], round_: Weighed) -> Expr:
    """`quantize` for a `round_` that is also given how much each entry counts, which is a number a column."""
    mask, w, v = now.mask(), now.dense().float(), weight[None]
    fit, codes = round_(w, v) if mask is None else round_(compact(w, mask), compact(v.expand(w.shape), mask))
    made = fit.encode(codes)
    return made if mask is None else now.rebuild(kept=made)


def grid_of(base: Expr) -> Quantized | None:
    """The quantized leaf of a base term: itself, or what a sparse one keeps."""
    kept = getattr(base, "kept", None)
    return grid_of(kept) if isinstance(kept, Expr) else base if isinstance(base, Quantized) else None


def onto(base: Expr, value: Float[Tensor, "m n"]) -> Expr:
    """A value on the grid that `base` has (`grid_of`), with its group and zero pattern: one rounding. A value on the grid stays.

    Each group keeps its scale and zero point or takes newly fitted ones, whichever errs less.
    """
    kept, mask = getattr(base, "kept", None), base.mask()
    if isinstance(kept, Expr) and mask is not None:
        return base.rebuild(kept=onto(kept, compact(value, mask)))
    grid = cast(Quantized, base)
    fit = _fit(grid, value)
    return fit.encode(nearest(value, fit))


def _fit(base: Quantized, value: Float[Tensor, "m n"]) -> Fitted:
    """For every group the grid it has or the best new one, whichever is nearer to the value."""
    zeros = base.zeros()
    points = zeros.to(torch.uint8) if isinstance(zeros, Tensor) else None
    held = Fitted(base.grid, base.group, base.scales(), points, base.scale, base.divisor())
    ones = torch.ones_like(value[:1])
    made = search(value, ones, base.grid, base.group, base.symmetric, scale=base.scale, like=held)
    stays = _miss(value, held) <= _miss(value, made)

    def choose(read: Callable[[Fitted], Tensor]) -> Tensor:
        return torch.where(stays, read(held), read(made))

    zero = None if base.symmetric else choose(lambda f: f.zero()).to(torch.uint8)
    return replace(held, scales=choose(lambda f: f.scales), zeros=zero)


def _miss(value: Float[Tensor, "m n"], fit: Fitted) -> Float[Tensor, "m g"]:
    """The squared rounding error of each group."""
    rounded = fit.encode(nearest(value, fit)).dense()
    return grouped(rounded - value, fit.group).square().sum(-1)
