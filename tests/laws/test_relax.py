"""Laws of every method of kind relax: what it leaves in weights, alone and in training, and what that is hardened to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny import build_tiny, make_batches, output, tokenizer
from torch import Tensor, nn

import weft
from weft.engine import get, names, objectives
from weft.error import OptionError, ShapeError
from weft.expr import NM, Dense, Expr, Quantized, Sum, build, spec, tensors
from weft.expr.softquantized import SoftQuantized
from weft.learn.data import Text
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.linalg.grids import minmax, nearest, rounded, search
from weft.model import expressions, fingerprint, fork, weave

from .cases import STARTS, after, base, better, group, options, snapshot
from .test_schedules import Until

RELAX = [name for name in names() if get(name).kind == "relax"]
DATA = [Text(f"the {a} sat on the {b} mat .") for a in ("cat", "dog", "bird") for b in ("old", "red")]


def moved(expr: Expr, salt: int = 0) -> Expr:
    """The expression after a step of training far too large."""
    rng = torch.Generator().manual_seed(salt)
    held = {
        k: nn.Parameter(t + 0.3 * t.detach().std().nan_to_num(1.0) * torch.randn(t.shape, generator=rng))
        if t.requires_grad
        else t
        for k, t in tensors(expr).items()
    }
    return build(spec(expr), held.__getitem__)


def soft_and_hard_are_one_value(name: str) -> None:
    """To the bit, at the start and after training; hard is frozen, packed and smaller, and hard already. Zeros and adapters stay."""
    for start in STARTS:
        g = group(start)
        for site, soft in zip(g, after(g, name), strict=True):
            for expr in (soft, moved(soft)):
                hard = expr.hard()
                assert torch.equal(hard.dense(), expr.dense()) and hard.hard() is hard, start
                assert not any(type(n).soft for n in hard.modules() if isinstance(n, Expr))
                assert base(hard).frozen() and base(hard).nbytes() < base(expr).nbytes()
                mask = base(hard).mask()
                assert (mask is None) == (site.now.mask() is None) and (
                    mask is None or not bool(base(expr).dense()[~mask].any())
                )
            if start != "delta":  # whose rows are made even
                assert base(soft).promises().nm == base(site.now).promises().nm
                assert mask is None or torch.equal(mask, site.now.mask())
            assert all(p.dtype == torch.float32 for p in base(soft).parameters() if p.requires_grad)
            assert not base(soft).frozen()
            if isinstance(site.now, Sum):
                assert {r: snapshot(t) for r, t in soft.named().items() if r != "base"} == {
                    r: snapshot(t) for r, t in site.now.named().items() if r != "base"
                }


def it_begins_near(name: str) -> None:
    """No farther than rounding to the nearest, by its own error; with more bits nearer."""
    for site, soft in zip(g := group("dense"), after(g, (name, {"bits": 3, "group": 16})), strict=True):
        w = site.now.dense()
        fit = minmax(w, "int3", 16, True)
        assert float((soft.dense() - w).norm()) <= 1.001 * float((rounded(w, fit) - w).norm())
    for option, _ in better(get(name)):
        few, many = (float(sum((e.dense() - s.original).square().sum() for s, e in zip(g, after(g, (name, {option: v})), strict=True)))
                     for v in (2, 6))  # fmt: skip
        assert many < few


def all_shapes_go(name: str) -> None:
    """Odd ones, one row, one column; options over their range; outside it they are refused."""
    for rows, n in (((1, 3), 7), ((5,), 1), ((2, 9), 33)):
        for soft in after(group("dense", rows, n), name):
            assert bool(torch.isfinite(soft.dense()).all())
    for option, good, bad in options(get(name)):
        for value in good:
            for soft in after(group("dense", (3,), 16), (name, {option: value})):
                assert torch.equal(soft.hard().dense(), soft.dense())
        for value in bad:
            with pytest.raises(OptionError, match=option):
                get(name).bind({option: value})


def zero_and_huge_weights_stay_finite(name: str) -> None:
    """Of what is trained, too."""
    for w in (torch.zeros(3, 16), 1e30 * torch.randn(3, 16), 1e-30 * torch.randn(3, 16)):
        soft = get(name)(group("dense", (3,), 16).put([Dense(w)]))
        soft.dense().sum().backward()
        assert bool(torch.isfinite(soft.dense()).all())
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in soft.parameters())
        assert torch.equal(soft.hard().dense(), soft.dense())


def learnt(model: nn.Module, **more: Any) -> list[float]:
    """The losses of eight steps."""
    how: dict[str, Any] = {"steps": 8, "batch": 4, "lr": 3e-3, "schedule": "constant", **more}
    return [loss for _, loss in train(model, DATA, tokenizer=tokenizer(), **how).losses]


def ready(name: str, **how: Any) -> nn.Module:
    model = weave(build_tiny())
    weft.apply(model, name, bits=3, group=16, **how)
    return model


def it_trains_and_becomes_ordinary(name: str) -> None:
    """The loss falls and every linear weight of the blocks moves; hardened it gives the same outputs from a packed model, which loads."""
    model, again = ready(name), ready(name)
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    losses = learnt(model)
    assert losses == learnt(again) and fingerprint(model) == fingerprint(again)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2]) and all(map(math.isfinite, losses))
    assert all(not torch.equal(p, before[n]) for n, p in trainable(model).items())
    batch = make_batches(1)[0]
    want = output(model, batch)
    with TemporaryDirectory() as folder:
        weft.save(model, f"{folder}/soft")
        assert torch.equal(output(weft.load(f"{folder}/soft"), batch), want)
        soft = set(weft.harden(model))
        assert (
            soft == {n for n, e in expressions(again).items() if not e.frozen()}
            and len(soft) == 14
            and not weft.harden(model)
        )
        assert not trainable(model) and torch.allclose(output(model, batch), want, atol=1e-5)
        weft.save(model, f"{folder}/hard")
        back = weft.load(f"{folder}/hard")
    plain = weave(build_tiny())
    weft.apply(plain, "rtn", bits=3, group=16, at="all-linear")
    assert {n: e.describe() for n, e in expressions(back).items()} == {
        n: e.describe() for n, e in expressions(plain).items()
    }
    assert torch.equal(output(back, batch), output(model, batch))


def it_goes_on_from_a_checkpoint(name: str) -> None:
    """Stopped and called again it ends with the same bits, also towards a reference, and beside an adapter."""
    for stop, aim in ((3, None), (5, objectives.named("distill"))):
        whole, stopped, again = (ready(name) for _ in range(3))
        for model in (whole, stopped, again):
            weft.apply(model, "lora", rank=2)
        learnt(whole, objective=aim)
        with TemporaryDirectory() as folder:
            kept: dict[str, Any] = {"out": Path(folder), "save_every": 1, "objective": aim}
            with pytest.raises(KeyboardInterrupt):
                learnt(stopped, progress=Until(stop), **kept)
            learnt(again, **kept)
        assert fingerprint(whole) == fingerprint(again)
        weft.harden(again)
        assert set(trainable(again)) == {n for n, _ in again.named_parameters() if "adapter:default" in n}


def other_methods_take_it(name: str) -> None:
    """What is soft is rounded, pruned, merged and forked as any weight is."""
    batch = make_batches(1)[0]
    model = ready(name)
    other = fork(model)
    learnt(other)
    assert not torch.equal(output(other, batch), output(model, batch))
    for method in ("rtn", "magnitude", "full"):
        changed = fork(other)
        weft.apply(changed, method)
        assert bool(torch.isfinite(output(changed, batch)).all()) and not any(
            isinstance(n, SoftQuantized) for n in changed.modules()
        )
    want = output(other, batch)
    weft.merge(other, to="dense")
    assert torch.allclose(output(other, batch), want, atol=1e-5)


LAWS = (
    soft_and_hard_are_one_value, it_begins_near, all_shapes_go, zero_and_huge_weights_stay_finite, it_trains_and_becomes_ordinary,
    it_goes_on_from_a_checkpoint, other_methods_take_it,
)  # fmt: skip


@pytest.mark.parametrize("name", RELAX)
@pytest.mark.parametrize("law", LAWS, ids=lambda f: f.__name__)
def test_relax(law: Callable[[str], None], name: str) -> None:
    """Every law of every relax method."""
    law(name)


def by_hand(w: Tensor, step: Tensor, grad: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of LSQ, entry by entry in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    value, to_w, to_step = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(step)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            k = j // size
            s = abs(float(step[i, k].bfloat16()))
            at, width = float(w[i, j]) / s, min(size, w.shape[1] - k * size)
            code = min(max(round(at), low), high)
            value[i, j] = code * s
            inside = low <= at <= high
            to_w[i, j] = grad[i, j] if inside else 0
            sign = 1 if float(step[i, k]) > 0 else -1
            to_step[i, k] += float(grad[i, j]) * (code - at if inside else code) * sign / math.sqrt(width * high)
    return value, to_w, to_step


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("size", [4, 5, 0])
def test_gradients_are_those_of_lsq(bits: int, size: int) -> None:
    """Within the range, outside it, of short groups and of a step below zero."""
    rng = torch.Generator().manual_seed(bits)
    w, grad = (torch.randn(3, 12, generator=rng) for _ in range(2))
    step = torch.randn(3, -(-12 // (size or 12)), generator=rng) * 4 / 2**bits
    node = SoftQuantized(nn.Parameter(w.clone()), nn.Parameter(step.clone()), bits, size)
    value, to_w, to_step = by_hand(w, step, grad, bits, size or 12)
    made = node.dense()
    made.backward(grad)
    assert torch.allclose(made, value, rtol=1e-6) and torch.equal(made, node.hard().dense())
    assert node.w.grad is not None and node.step.grad is not None
    assert torch.allclose(node.w.grad, to_w) and torch.allclose(node.step.grad, to_step, rtol=1e-4, atol=1e-5)
    assert len(value.unique()) > 1 and (bits == 8 or bool((to_w == 0).any()))


def test_lsq_begins_at_the_nearest_codes_of_the_searched_grid() -> None:
    """Codes and scales are those of the search; kept entries alone where there is a pattern."""
    for site, soft in zip(g := group("dense"), after(g, ("lsq", {"bits": 3, "group": 16})), strict=True):
        w = site.now.dense()
        fit = search(w, torch.ones_like(w[:1]), "int3", 16, True)
        hard = soft.hard()
        assert isinstance(hard, Quantized) and torch.equal(hard.data, fit.encode(nearest(w, fit)).data)
    for start in ("quantized", "sum"):  # which is on such a grid, and stays
        for site, soft in zip(g := group(start), after(g, ("lsq", {"bits": 4, "group": 16})), strict=True):
            assert torch.equal(soft.hard().dense(), site.now.dense())
    for soft in after(group("2:4"), "lsq"):
        assert isinstance(soft, NM) and isinstance(soft.hard(), NM)


def test_steps_that_do_not_fit_are_refused() -> None:
    """Of another number, and bits that are no grid's."""
    for bits, group_, steps in ((3, 4, 2), (1, 0, 1), (9, 0, 1), (3, -1, 1)):
        with pytest.raises(ShapeError, match="SoftQuantized"):
            SoftQuantized(torch.zeros(2, 12), torch.ones(2, steps), bits, group_)
