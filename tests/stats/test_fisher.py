"""The Fisher diagonal is the mean square of the plain model's own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from weft.expr import tensors
from weft.model import expressions, places, weave
from weft.stats import fisher, forward, objective
from weft.stats.gradients import trim


def plain(family: str, tiny: Any, batches: list[dict[str, Tensor]], seed: int) -> tuple[dict[str, Tensor], int]:
    """Squared gradients of every parameter, summed over sequences, in float64 on the plain model; and the units."""
    model = tiny(family, dtype=torch.float64)
    goal, rng, units = objective(model), torch.Generator().manual_seed(seed), 0
    sums = {id(p): torch.zeros_like(p) for p in model.parameters()}
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            one = trim({k: v[i : i + 1] for k, v in batch.items()})
            vectors = goal.vectors(forward(model, one), one)
            model.zero_grad()
            goal.probe(vectors, rng).backward()
            units += len(vectors)
            for p in model.parameters():
                if p.grad is not None:
                    sums[id(p)] += p.grad**2
    return {n: sums[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}, units


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert", "bert-mlm"])
def test_fisher_is_the_mean_square_of_gradients(family: str, tiny: Any, batches: Any) -> None:
    """Of linear layers, embeddings and tied weights, padding left out; the model is as it was, and frozen."""
    want, units = plain(family, tiny, batches(), 3)
    model = weave(tiny(family))
    before, checked = expressions(model), 0
    made = fisher(model, list(before), batches(), objective(model), seed=3)
    for name, place in places(model).items():
        w = want[f"{place.modules[0]}.weight"] / units
        assert torch.allclose(made[name].double(), w, rtol=2e-3, atol=1e-4 * float(w.max())), name
        checked += bool((w > 0).any())
    after = expressions(model)
    assert checked > 12 and all(after[n] is e for n, e in before.items())
    assert not any(t.requires_grad for e in after.values() for t in tensors(e).values())


def test_sites_may_come_in_lots(tiny: Any, batches: Any) -> None:
    """One site alone has what it has among all: the labels drawn are the same."""
    model = weave(tiny())
    names = list(expressions(model))
    whole = fisher(model, names, batches(), objective(model), seed=1)
    for name in (names[0], names[5]):
        alone = fisher(model, [name], batches(), objective(model), seed=1)[name]
        assert torch.allclose(alone, whole[name], rtol=1e-5, atol=1e-9)
