"""The diagonal of the Fisher information: how much the loss bends with every single weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.expr import Dense, Expr
from weft.memory import release
from weft.model import expressions, finite, set_expressions
from weft.stats.evidence import key as evidence_key
from weft.stats.gradients import lean, trim
from weft.stats.objective import Objective, objective
from weft.stats.walker import Batch, forward
from weft.store.cache import Cache, key

TOGETHER = 1 << 28
"""Entries of the weights whose single gradients are held at a time."""


def fisher(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], objective: Objective, *, seed: int = 0
) -> dict[str, Float[Tensor, "m n"]]:
    """F_ij = E[(dL/dw_ij)²] a unit (token or text) of these sites: a change dW costs about ½ Σ_ij F_ij dW_ij² a unit.

    L is `objective.probe`, the random loss of a whole sequence, so that what its positions have in common counts and a tied
    weight has the gradient of both its uses. One backward pass a sequence. Memory: two float32 a weight of these sites, and
    one block's activations. The model is left as it was. Errors: NumericError with the site's name.
    """
    before, rng, units = expressions(model), torch.Generator().manual_seed(seed), 0
    free = {n: nn.Parameter(before[n].dense().detach().float().clone()) for n in names}
    sums = {n: torch.zeros_like(w) for n, w in free.items()}
    set_expressions(model, {n: Dense(w) for n, w in free.items()})
    try:
        with torch.enable_grad(), lean(model):
            for batch in batches:
                for i in range(len(next(iter(batch.values())))):
                    one = trim({k: v[i : i + 1] for k, v in batch.items()})
                    vectors = objective.vectors(forward(model, one), one)
                    objective.probe(vectors, rng).backward()
                    units += len(vectors)
                    for n, w in free.items():
                        if w.grad is not None:  # a site that this sequence did not reach has none
                            sums[n].addcmul_(w.grad, w.grad)
                            w.grad = None
    finally:
        set_expressions(model, {n: before[n] for n in names})
    return {n: finite(s, f"{n}.gradient") / max(1, units) for n, s in sums.items()}


def fishers(
    model: nn.Module, batches: Sequence[Batch], cache: Cache, *, seed: int = 0
) -> dict[str, Float[Tensor, "m n"]]:
    """`fisher` of every site, a lot of them at a time, found once and mapped from the cache. Errors: NumericError."""
    about, made = evidence_key(model, batches, seed, gradient=True), dict[str, Tensor]()
    for names in lots(expressions(model)):

        def make(names: Sequence[str] = names) -> dict[str, Tensor]:
            return fisher(model, names, batches, objective(model), seed=seed)

        made |= cache.tensors("fisher", key(about, names), make)
        release()
    return made


def lots(exprs: Mapping[str, Expr]) -> Iterator[list[str]]:
    """These sites in lots of no more than `TOGETHER` entries, but one site at least."""
    lot, size = list[str](), 0
    for name, expr in exprs.items():
        count = expr.shape[0] * expr.shape[1]
        if lot and size + count > TOGETHER:
            yield lot
            lot, size = [], 0
        lot.append(name)
        size += count
    yield lot
