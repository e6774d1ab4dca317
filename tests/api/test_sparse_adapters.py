"""Adapters that train some entries or some columns of a weight, against dense gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.tiny import build_tiny
from weft.expr import LowRank, SparseDelta, terms_of

IDS = torch.randint(0, 90, (3, 7), generator=torch.Generator().manual_seed(5))
SITE = "model.layers.0.mlp.up_proj.weight"


def adapted(method: str, base: tuple[str, dict[str, Any]] | None = None, **options: Any) -> nn.Module:
    model = weft.weave(build_tiny("llama"))
    if base:
        weft.apply(model, base[0], at="all-linear", **base[1])
    weft.apply(model, method, **options)
    return model


def dense_gradient() -> torch.Tensor:
    """That of one weight of the plain model."""
    plain = build_tiny("llama")
    plain(input_ids=IDS, labels=IDS).loss.backward()
    return plain.get_parameter(SITE).grad


@pytest.mark.parametrize("by", ["random", "largest", "smallest"])
def test_entries_have_the_gradient_of_the_weight(by: str) -> None:
    model = adapted("sparse", rank=1, by=by)
    terms = terms_of(weft.expressions(model)[SITE])
    held, w = terms["adapter:default"], terms["base"].dense()
    assert isinstance(held, SparseDelta) and len(held.values) == sum(w.shape)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(held.values.grad, dense_gradient()[held.mask()], rtol=1e-4, atol=1e-7)
    if by != "random":
        inside, outside = w.abs()[held.mask()], w.abs()[~held.mask()]
        assert bool(inside.min() >= outside.max()) if by == "largest" else bool(inside.max() <= outside.min())


def test_zeros_of_a_pattern_stay() -> None:
    """Trained and merged, a 2:4 weight is one."""
    model = adapted("sparse", ("magnitude", {"pattern": "2:4"}), rank=4)
    kept = weft.expressions(model)[SITE]
    mask = terms_of(kept)["base"].mask()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    weft.merge(model, to="dense")
    value = weft.expressions(model)[SITE].dense()
    assert bool((value[~mask] == 0).all()) and int((value.view(len(value), -1, 4) != 0).sum(2).max()) == 2


def test_columns_have_the_gradient_of_the_weight() -> None:
    """k whole columns, the same in all weights of a width; to other tools a LoRA of rank k."""
    model = adapted("s2ft", features=6)
    held = terms_of(weft.expressions(model)[SITE])["adapter:default"]
    assert isinstance(held, LowRank) and not held.a.requires_grad
    at = held.a.float().argmax(1)
    assert torch.equal(held.a.float(), torch.eye(held.shape[1])[at]) and len(at.unique()) == 6
    gate = terms_of(weft.expressions(model)[SITE.replace("up", "gate")])["adapter:default"]
    assert isinstance(gate, LowRank) and torch.equal(gate.a, held.a)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(held.b.grad, dense_gradient()[:, at], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("method", "options"), [("sparse", {"rank": 500}), ("s2ft", {"features": 500})])
def test_more_than_there_is_is_declared(method: str, options: dict[str, Any]) -> None:
    model = weft.weave(build_tiny("llama"))
    assert any("which is all" in what for _, what in weft.apply(model, method, **options).fallbacks)
