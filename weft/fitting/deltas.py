"""What tuning changed in a weight in each of the forms that could store it: low-rank, sparse, signs, a grid, and sums of two."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weft.expr import Dense, Expr, LowRank, Product, Signs, SparseDelta, Sum
from weft.linalg.grids import minmax, nearest, search
from weft.linalg.lowrank import truncate, whitened
from weft.linalg.masks import largest
from weft.model import Group

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
FACTORS = ("bf16", "int8", "int4")
"""What the entries of low-rank factors are stored as."""
ENTRIES = (0.001, 0.01)
"""Shares of the entries that are kept with their values."""
SIGNS = (0.02, 0.05, 0.1, 0.2)
"""Shares of the entries that are kept as signs of one size."""
BESIDE = (0.02, 0.1)
"""Those that stand beside a low-rank part."""
GRIDS = ("sign", "ternary", "int2", "int3", "int4", "int6", "int8")
WIDTHS = (0, 64)
"""Columns a scale of a grid; 0: all."""

Form = Callable[[], Expr]
"""Makes a difference in one form."""


def families(delta: Float[Tensor, "m n"], group: Group | None) -> list[list[Form]]:
    """Every form that fits a difference [m n], by family; in a family each takes more bytes than those before.

    With a `group`, whose evidence says what inputs are like, errors are weighed by it: low-rank parts are truncated behind the root of
    the Gram matrix, entries chosen by |d_ij| sqrt(E[x_j²]), the scales of grids searched under E[x_j²]. Without, all entries count alike.
    """
    m, n = delta.shape
    weight = group.second_moment().float()[None] if group is not None else torch.ones(1, n)
    ranks = [r for r in RANKS if 2 * r <= min(m, n)]

    @functools.cache
    def factors() -> LowRank:
        """Of the highest rank: those of a lower one are its first."""
        if group is None:
            return truncate(delta, ranks[-1], torch.float32)
        return whitened(delta, *group.roots(), ranks[-1], torch.float32)

    @functools.cache
    def low(rank: int, kind: str) -> Expr:
        b, a = factors().b[:, :rank], factors().a[:rank]
        if kind == "bf16":
            return LowRank(b.to(torch.bfloat16), a.to(torch.bfloat16))
        return Product(_on(kind, 0, b), _on(kind, 64 if n > 64 else 0, a))

    def summed(rank: int, kind: str, share: float) -> Expr:
        part = low(rank, kind)
        return Sum({"base": part, "compensation": _signs(delta - part.dense(), weight, share)})

    part = functools.partial
    made: list[list[Form]] = [[part(low, r, k) for r in ranks] for k in FACTORS]
    made += [[part(_sparse, delta, weight, s) for s in ENTRIES], [part(_signs, delta, weight, s) for s in SIGNS]]
    made += [[part(summed, r, FACTORS[-1], s) for r in ranks] for s in BESIDE]
    made += [[part(_on, g, w, delta, weight) for g in GRIDS] for w in WIDTHS if w < n]
    return [*made, [lambda: Dense(delta.to(torch.bfloat16))]]


def _on(name: str, width: int, value: Float[Tensor, "m n"], weight: Float[Tensor, "1 n"] | None = None) -> Expr:
    """A value on a grid, with searched scales where that gains: signs have their best one, and at 8 bits nothing is cut off."""
    ones = torch.ones_like(value[:1]) if weight is None else weight
    simple = name in ("sign", "int8")
    fit = minmax(value, name, width, True) if simple else search(value, ones, name, width, True, steps=5)
    return fit.encode(nearest(value, fit))


def _sparse(delta: Float[Tensor, "m n"], weight: Float[Tensor, "1 n"], share: float) -> Expr:
    """The entries that weigh most."""
    return SparseDelta.of(delta.to(torch.bfloat16), _most(delta, weight, share))


def _signs(delta: Float[Tensor, "m n"], weight: Float[Tensor, "1 n"], share: float) -> Expr:
    """The signs of the entries that weigh most, at the size of least weighed error: Σ w |d| / Σ w over them."""
    counted = weight * _most(delta, weight, share)
    size = (counted * delta.abs()).sum() / counted.sum().clamp(min=1e-30)
    return Signs.of(delta.sign() * (counted > 0), size.to(torch.bfloat16))


def _most(delta: Float[Tensor, "m n"], weight: Float[Tensor, "1 n"], share: float) -> Bool[Tensor, "m n"]:
    """So large a share of the entries, at least one, by |d_ij| sqrt(weight_j)."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[largest((delta.abs() * weight.sqrt()).flatten(), max(1, round(share * delta.numel())))] = True
    return mask.view(delta.shape)
