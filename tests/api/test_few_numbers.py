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
    "nola": {"rank": 2, "count": 6},
    "fourierft": {"count": 40},
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
    torch.testing.assert_close(
        made.detach().double(), want.double(), rtol=1e-5, atol=1e-5 * float(want.detach().abs().max())
    )


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


def test_nola_mixes_its_factors_of_random_matrices() -> None:
    """(Σ b_j B_j) (Σ a_i A_i); the first factor starts at zero, the second as large as that of LoRA."""
    made = term(moved(get("nola")(site(7, 9), rank=2, count=3)))
    up, down = (f for f in made.kids() if isinstance(f, Basis))
    b = sum(float(c) * matrix(up.seed, 7, 2, j) for j, c in enumerate(up.c)) * 3**-0.5
    a = sum(float(c) * matrix(down.seed, 2, 9, i) for i, c in enumerate(down.c)) * (9 * 3) ** -0.5
    close(made.dense(), b @ a)
    start = term(get("nola")(site(40, 60), rank=8, count=300))
    up, down = (f for f in start.kids() if isinstance(f, Basis))
    assert not bool(up.c.any()) and 0.8 < float(down.dense().var()) * 60 < 1.25


def test_fourierft_is_the_real_part_of_an_inverse_transform() -> None:
    """alpha ifft2 of a spectrum with a few entries, at places that weights of a shape share."""
    e = moved(get("fourierft")(site(8, 12), count=5, alpha=3.0))
    made = term(e)
    assert isinstance(made, Basis)
    every = Basis(torch.eye(5).double()[0], "fourier", made.seed, 8, 12)
    spectrum = torch.zeros(8, 12, dtype=torch.complex128)
    for k, c in enumerate(made.c.detach().double()):
        spectrum[place(every.rebuild(c=torch.eye(5).double()[k]).dense())] = complex(c)
    close(made.dense(), 3 * torch.fft.ifft2(spectrum, norm="ortho").real)
    twin, other = (term(get("fourierft")(site(8, 12, name), count=5)) for name in ("a", "b"))
    assert isinstance(twin, Basis) and isinstance(other, Basis) and twin.seed == other.seed


def place(wave: Tensor) -> tuple[int, int]:
    """The one frequency of a wave: of the two that look alike, either."""
    at = int(torch.fft.fft2(wave).abs().argmax())
    return at // wave.shape[1], at % wave.shape[1]
