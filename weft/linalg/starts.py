"""Where the factors of a low-rank adapter start: directions of the weight or of its inputs, or what rounding lost."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr import Expr, LowRank
from weft.linalg.lowrank import whitened
from weft.linalg.sparse import grid_of, onto

ROUNDS = 5
"""Turns, at most, between a base and its adapter."""
DAMP = 0.01
"""Share of its mean diagonal that is added to a Gram before it is inverted."""
LEAST = 1e-3
"""The least that a row counts beside the mean one."""


def orthonormal(w: Float[Tensor, "m n"], rank: int) -> LowRank:
    """OLoRA: the first columns of Q and the first rows of R in W = Q R. B is orthonormal."""
    q, r = torch.linalg.qr(w.double())
    return LowRank(q[:, :rank].float(), r[:rank].float())


def inputs(gram: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "r n"]:
    """EVA: the right singular vectors of the inputs with the largest values, which are eigenvectors of their Gram."""
    _, q = torch.linalg.eigh(gram.double())
    return q[:, -rank:].flip(1).T.float().contiguous()


def oriented(w: Float[Tensor, "m n"], gram: Float[Tensor, "n n"], rank: int, *, last: bool) -> LowRank:
    """CorDA: the part of W = U S (Vᵀ C⁻¹), with U S Vᵀ = W C, of the largest singular values, or of the `last`; C the damped Gram."""
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    c = gram.double() + max(DAMP * float(gram.diagonal().mean()), 1e-30) * eye
    return whitened(w, c, torch.linalg.inv(c), rank, torch.float32, last=last)


def weighed(
    error: Float[Tensor, "m n"],
    rows: Float[Tensor, "m"],
    roots: tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]],
    rank: int,
) -> LowRank:
    """argmin over rank r of Σ_i rows_i ||(error - B A)_i R||², with the Gram R Rᵀ and R⁺ as `roots`."""
    d = _counts(rows).sqrt()[:, None]
    made = whitened(d * error.double(), *roots, rank, torch.float32)
    return LowRank((made.b / d).float(), made.a)


def seen(error: Float[Tensor, "m n"], rows: Float[Tensor, "m"], gram: Float[Tensor, "n n"]) -> float:
    """Σ_i rows_i error_i G error_iᵀ, as `weighed` counts it."""
    e = error.double()
    return float(_counts(rows) @ ((e @ gram.double()) * e).sum(1))


def _counts(rows: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """How much each row counts, in shares of the mean; each at least `LEAST`, all alike if none does."""
    mean = rows.double().mean()
    return (rows.double() / mean).clamp(min=LEAST) if float(mean) > 0 else torch.ones_like(rows, dtype=torch.float64)


def by_turns(
    base: Expr,
    target: Float[Tensor, "m n"],
    best: Callable[[Float[Tensor, "m n"]], LowRank],
    cost: Callable[[Float[Tensor, "m n"]], float],
) -> tuple[Expr, LowRank]:
    """A base and a low-rank term that together are near `target`: the term `best` for what the base lost, the base rounded anew to
    what the term leaves, and so on for as long as the `cost` of the error falls. A base without a grid stays as it is.
    """
    term = best(target - base.dense().float())
    least = cost(target - base.dense().float() - term.dense())
    for _ in range(ROUNDS if grid_of(base) is not None else 0):
        now = onto(base, target - term.dense())
        new = best(target - now.dense())
        if not (miss := cost(target - now.dense() - new.dense())) < least:
            break
        base, term, least = now, new, miss
    return base, term
