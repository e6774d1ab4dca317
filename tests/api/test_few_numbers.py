"""Adapters of few numbers, each against its formula in float64; on a packed base trained, saved, forked and merged."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine import Group, Site, get
from weft.error import ConflictError
from weft.expr import Basis, Dense, Expr, Quantized, basis, fork, tensors, terms_of
from weft.expr.cayley import Cayley

from .cases import logits, values

M = TypeVar("M", bound=nn.Module)
MODELS = Callable[..., Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "vera": {"rank": 5},
    "nola": {"rank": 2, "count": 6},
    "fourierft": {"count": 40},
    "lokr": {"factor": 4},
    "loha": {"rank": 2},
    "oft": {"block": 4},
    "loca": {"count": 40},
    "said": {"count": 20},
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
    """Loaded it has the same bits, though products of what is frozen may add up in another order; merged it is one matrix."""
    model = moved(adapted(folder(), method))
    weft.save(model, tmp_path / "saved")
    back = weft.load(tmp_path / "saved")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-4)
    want = values(model)
    assert all(torch.equal(value, want[name]) for name, value in values(back).items())
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
    assert float(tensors(start)["factors.2.d"].detach().mean()) == pytest.approx(0.1) and not bool(start.dense().any())


def test_nola_mixes_its_factors_of_random_matrices() -> None:
    """(Σ b_j B_j) (Σ a_i A_i); the first factor starts at zero, the second as large as that of LoRA."""
    made = term(moved(get("nola")(site(7, 9), rank=2, count=3)))
    up, down = (f for f in made.kids() if isinstance(f, Basis))
    b = sum(c * matrix(up.seed, 7, 2, j) for j, c in enumerate(up.c.detach())) * 3**-0.5
    a = sum(c * matrix(down.seed, 2, 9, i) for i, c in enumerate(down.c.detach())) * (9 * 3) ** -0.5
    close(made.dense(), b @ a)
    start = term(get("nola")(site(40, 60), rank=8, count=300))
    up, down = (f for f in start.kids() if isinstance(f, Basis))
    assert not bool(up.c.any()) and 0.8 < float(down.dense().var()) * 60 < 1.25


def test_fourierft_is_the_real_part_of_an_inverse_transform() -> None:
    """alpha ifft2 of a spectrum with a few entries, at places that weights of a shape share."""
    e = moved(get("fourierft")(site(8, 12), count=5, alpha=3.0))
    made = term(e)
    assert isinstance(made, Basis)
    every = Basis(torch.eye(5).double()[0], made.kind, made.seed, 8, 12)
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


@pytest.mark.parametrize("rank", [2, 3, 4096])
def test_lokr_is_a_kronecker_product(rank: int) -> None:
    """U ⊗ V, or U ⊗ (B A); a rank that saves nothing gives V whole."""
    made = term(moved(get("lokr")(site(12, 20), factor=4, rank=rank)))
    held = {k: t.detach().double() for k, t in tensors(made).items()}
    if rank == 2:
        u, v = held["factors.0.a"], held["factors.0.b"] @ held["factors.1.b"]
        assert torch.equal(held["factors.1.a"], torch.eye(4).double())
        assert [k for k, t in tensors(made).items() if t.requires_grad] == ["factors.0.a", "factors.0.b", "factors.1.b"]
    else:
        u, v = held["a"], held["b"]
    assert (*u.shape, *v.shape) == (4, 4, 3, 5)
    close(made.dense(), torch.kron(u, v))


def test_lokr_says_where_no_factor_fits() -> None:
    """Of prime sides the right factor is the whole matrix."""
    group = site(11, 13)
    made = term(get("lokr")(group))
    assert tensors(made)["b"].shape == (11, 13) and "11 nor 13" in group.notes[0][1]


def test_loha_is_a_product_entry_by_entry() -> None:
    """(B A) ⊙ (D C), of more than twice the rank of its factors together; nothing dense is kept for the backward."""
    made = term(moved(get("loha")(site(24, 18), rank=3)))
    b, a, d, c = (t.detach().double() for t in tensors(made).values())
    close(made.dense(), (b @ a) * (d @ c))
    assert int(torch.linalg.matrix_rank(made.dense().detach().double(), rtol=1e-5)) == 9 == made.promises().rank
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(torch.randn(2, 18, requires_grad=True)).sum().backward()
    assert all(t.numel() < 24 * 18 for t in kept)


def test_oft_keeps_lengths_and_angles() -> None:
    """W R: every product of two rows is what it was, and the packed weight is multiplied as it is."""
    group = site(10, 24)
    group = group.put([get("rtn")(group, bits=4, group=8)])
    e = moved(get("oft")(group, block=6))
    base, side = e.kids()
    assert isinstance(base, Quantized) and base is group.now
    r = side.dense().detach().double()
    close(r @ r.T, torch.eye(24).double())
    assert float((r - torch.eye(24)).abs().max()) > 0.05 and float(torch.linalg.det(r)) == pytest.approx(1, abs=1e-5)
    w, was = e.dense().detach().double(), base.dense().double()
    close(w, was @ r)
    close(w @ w.T, was @ was.T)
    x = torch.randn(3, 24)
    close(e(x), (x.double() @ r.T) @ was.T)


@pytest.mark.parametrize(("n", "block", "taken"), [(24, 6, 6), (24, 5, 6), (7, 32, 7), (1, 32, 1), (30, 8, 10)])
def test_oft_takes_the_nearest_block(n: int, block: int, taken: int) -> None:
    """And says so, unless it is the one that was asked for."""
    group = site(3, n)
    side = get("oft")(group, block=block).acting()[-1]
    assert isinstance(side, Cayley) and side.block == taken and bool(group.notes) == (taken != block)


def test_loca_is_an_inverse_cosine_transform() -> None:
    """alpha Dᵀ F D of a sparse F, D the orthonormal cosine transform but for its first row."""
    made = term(moved(get("loca")(site(6, 10), count=4, alpha=2.0)))
    assert isinstance(made, Basis)
    d = {}
    for size in (6, 10):
        k, i = torch.arange(size).double()[:, None], torch.arange(size).double()[None]
        d[size] = (2 / size) ** 0.5 * torch.cos(torch.pi * k * (i + 0.5) / size)
    spectrum = torch.zeros(6, 10).double()
    for k, c in enumerate(made.c.detach().double()):
        wave = Basis(torch.eye(4)[k].double(), "cosine", made.seed, 6, 10).dense()
        found = d[6] @ wave @ d[10].T
        at = int(found.abs().argmax())
        assert int((found.abs() > 1e-9).sum()) == 1
        spectrum.view(-1)[at] += c
    assert int((spectrum != 0).sum()) == 4
    close(made.dense(), 2 * d[6].T @ spectrum @ d[10])


def test_said_trains_in_a_random_subspace() -> None:
    """P z is linear in z; the columns of P have about length 1 and are about at right angles, for numbers that are no power of two."""
    made = term(get("said")(site(48, 40), count=100))
    assert isinstance(made, Basis) and made.c.shape == (100,) and not bool(made.dense().any())
    columns = torch.stack([made.rebuild(c=unit).dense().flatten() for unit in torch.eye(100)], 1).double()
    gram = columns.T @ columns
    assert float(gram.diagonal().min()) > 0.8 and float(gram.diagonal().max()) < 1.2
    assert float((gram - torch.diag(gram.diagonal())).abs().max()) < 0.15
    z = torch.randn(100)
    close(made.rebuild(c=z).dense().flatten(), columns @ z.double())


@pytest.mark.parametrize("method", ["fourierft", "loca", "said"])
def test_a_small_weight_has_fewer_numbers(method: str) -> None:
    """As many as it has entries, and that is said."""
    group = site(3, 4)
    made = term(get(method)(group, count=100))
    assert tensors(made)["c"].shape == (12,) and "12 " in group.notes[0][1]


@pytest.mark.parametrize("method", sorted(OPTIONS.keys() - {"oft", "fourierft", "loha", "lokr", "vera"}))
def test_peft_gets_none_of_it(folder: MODELS, tmp_path: Path, method: str) -> None:
    """What PEFT has no type for is refused by its name, and nothing is written."""
    model = adapted(folder(), method)
    with pytest.raises(ConflictError, match=re.escape(weft.expressions(model)[SITE].describe().split(": ")[-1])):
        weft.export(model, tmp_path / "adapter", to="peft")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", ["random", "cosine", "fourier", "fourier_mt19937", "fastfood"])
def test_what_is_generated_is_kept_once_or_not_at_all(kind: str) -> None:
    """Alike nodes have one copy, which goes with the last of them; where it would be large, it is made anew, with the same result."""

    def product(e: Basis) -> list[Tensor]:
        y = e(torch.ones(2, 11)).square().sum()
        return [
            y.detach(),
            *torch.autograd.grad(y, [e.c]),
            e.take(slice(3, 5)).dense(),
            e.take(torch.tensor([4, 0])).dense(),
        ]

    one, two = (Basis(nn.Parameter(torch.arange(1.0, 6)), kind, 77, 9, 11) for _ in range(2))
    first, second = product(one), product(two)
    kept = [weakref.ref(t) for t in one.tables(torch.float32)]
    assert all(a() is b for a, b in zip(kept, two.tables(torch.float32), strict=True))
    with mock.patch.object(basis, "_KEPT", 0):
        third = product(Basis(nn.Parameter(one.c.detach().clone()), kind, 77, 9, 11))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)
    del one, two, first, second
    gc.collect()
    assert not any(t() is not None for t in kept)
