"""Adapters of few numbers, each against its formula in float64; on a packed base trained, saved, forked and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine import Group, Site, get
from weft.expr import Basis, Dense, Expr, Quantized, fork, tensors, terms_of

from .cases import logits, values

M = TypeVar("M", bound=nn.Module)
MODELS = Callable[..., Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 5},
}
SITE = "model.layers.0.self_attn.q_proj.weight"


def site(m: int, n: int, name: str = "some", seed: int = 0) -> Group:
    """A group of one plain weight."""
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    return Group((Site(name, "linear", Dense(w), lambda: w, seed=seed),))


def moved(trained: M) -> M:
    """What trains, as if it had been trained."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.05)
    return trained


def adapted(place: Path, method: str) -> nn.Module:
    """A model with an adapter on a rounded base."""
    model = weft.load(place)
    weft.apply(model, "rtn", at="all-linear", group=16)
    weft.apply(model, method, **OPTIONS[method])
    return model


def term(e: Expr) -> Expr:
    """The adapter."""
    return terms_of(e)["adapter:default"]


@pytest.mark.parametrize("method", OPTIONS)
def test_it_trains_alone(folder: MODELS, method: str) -> None:
    """The model starts as it was; the gradient reaches every number of the adapter and nothing else; a fork has its own."""
    place = folder(dtype=torch.float32)
    plain = weft.load(place)
    weft.apply(plain, "rtn", at="all-linear", group=16)
    model = adapted(place, method)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    site, other = (moved(weft.expressions(model)[SITE]), weft.expressions(plain)[SITE])
    assert not torch.equal(site.dense(), other.dense())
    mine = fork(site)
    before = site.dense().detach()
    moved(mine)
    assert torch.equal(site.dense(), before) and not torch.equal(mine.dense(), before)
    model(torch.arange(2, 32).view(3, 10)).logits.square().mean().backward()
    for name, p in site.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    added = site.nbytes() - packed(site).nbytes()
    trained = sum(p.nbytes for p in site.parameters() if p.requires_grad)
    assert 0 < trained <= added <= trained + 16


def packed(e: Expr) -> Expr:
    """The packed leaf of a tree."""
    return next(x for x in e.modules() if isinstance(x, Quantized))


@pytest.mark.parametrize("method", OPTIONS)
def test_it_is_saved_and_merged(folder: MODELS, tmp_path: Path, method: str) -> None:
    """Bit for bit when loaded; merged dense it is one matrix, merged onto the grid a rounding of it."""
    model = moved(adapted(folder(), method))
    weft.save(model, tmp_path / "saved")
    back = weft.load(tmp_path / "saved")
    assert torch.equal(logits(back), logits(model))
    want = values(model)
    weft.merge(back, to="grid")
    assert isinstance(weft.expressions(back)[SITE], Quantized)
    weft.merge(model, to="dense")
    assert isinstance(weft.expressions(model)[SITE], Dense)
    torch.testing.assert_close(values(model)[SITE].float(), want[SITE].float(), rtol=0.01, atol=1e-3)


def matrix(seed: int, m: int, n: int, k: int = 0) -> Tensor:
    """The k-th random matrix of a seed, of entries of variance 1."""
    return Basis(torch.eye(k + 1)[k].double(), "random", seed, m, n).dense()


def close(made: Tensor, want: Tensor) -> None:
    """Equal but for float32 rounding."""
    torch.testing.assert_close(made.detach().double(), want.double(), rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_vera_is_two_scales_of_shared_factors() -> None:
    """diag(b) B diag(d) A; A and B are those of every other weight of the width, in the file and in memory, and of no other width."""
    made = [term(moved(get("vera")(site(7, 9, name), rank=4))) for name in ("one", "two")]
    held = tensors(made[0])
    b, d = held["factors.0.d"].double(), held["factors.2.d"].double()
    up, down = (f for f in made[0].kids() if isinstance(f, Basis))
    factors = matrix(up.seed, 7, 4) * (2 / 4) ** 0.5, matrix(down.seed, 4, 9) * (2 / 9) ** 0.5
    close(made[0].dense(), b[:, None] * (factors[0] @ (d[:, None] * factors[1])))
    others = [f for f in made[1].kids() if isinstance(f, Basis)]
    assert [f.tables(torch.float32)[0].data_ptr() for f in (up, down)] == [
        f.tables(torch.float32)[0].data_ptr() for f in others
    ]
    assert not torch.equal(factors[0], matrix(others[1].seed, 7, 4))
    start = term(get("vera")(site(7, 9), rank=4))
    assert float(tensors(start)["factors.2.d"].mean()) == pytest.approx(0.1) and not bool(start.dense().any())
