"""Adapters of several tasks over what they share: each is an ordinary LoRA, chosen for all rows or row by row, kept once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.tiny import build_tiny
from weft.error import ConflictError
from weft.expr import LowRank, terms_of, total
from weft.expr.gated import Gated, settled
from weft.expr.mixed import Mixed
from weft.learn.trainer import trainable
from weft.model import set_expressions
from weft.store import nbytes

IDS = torch.randint(0, 90, (3, 7), generator=torch.Generator().manual_seed(5))
METHODS = {"poly": {"rank": 3, "skills": 4, "heads": 4}, "mtlora": {"rank": 2, "own": 3}}
NAMES = ("a", "b", "c")


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def many(method: str, base: str = "") -> nn.Module:
    """A model with an adapter for each of three tasks, as if trained."""
    model = weft.weave(build_tiny("llama"))
    if base:
        weft.apply(model, base, at="all-linear")
    weft.apply(model, method, name=",".join(NAMES), **METHODS[method])
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.3)
    return model


def one(model: nn.Module, name: str) -> nn.Module:
    """A fork with the ordinary low-rank term of one task, and no other adapter."""
    made = weft.fork(model)
    for site, expr in weft.expressions(made).items():
        terms = terms_of(expr)
        if f"adapter:{name}" in terms:
            term = terms[f"adapter:{name}"]
            pair = settled(term.kept if isinstance(term, Gated) else term)
            assert isinstance(pair, LowRank)
            rest = {r: t for r, t in terms.items() if not r.startswith("adapter:")}
            set_expressions(made, {site: total({**rest, "adapter:default": pair})})
    return made


@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_task_is_an_ordinary_lora(method: str, base: str) -> None:
    """Active alone it gives what the low-rank term of its numbers gives; of mixed factors to the bit."""
    model = many(method, base)
    for name in NAMES:
        weft.activate(model, name)
        made, want = logits(model), logits(one(model, name))
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
        assert method != "poly" or torch.equal(made, want)
    assert len({logits(one(model, n)).sum().item() for n in NAMES}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_rows_have_tasks_of_their_own(method: str) -> None:
    model = many(method)
    want = [logits(one(model, n))[i] for i, n in enumerate(NAMES)]
    with weft.per_row(model, NAMES):
        made = logits(model)
    torch.testing.assert_close(made, torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_tasks_share_is_trained_by_all_and_kept_once(method: str, tmp_path: Path) -> None:
    """One tensor, with one gradient, in a fork of its own, on disk and after loading; another task costs only what is its own."""
    model = many(method)
    shared = {id(p) for p in trainable(model).values()}
    assert len(shared) == len(trainable(model))
    alone = weft.weave(build_tiny("llama"))
    weft.apply(alone, method, name="a", **METHODS[method])
    sites = sum("adapter:a" in terms_of(e) for e in weft.expressions(model).values())
    own = sum(
        4 * 16 if method == "poly" else 4 * 3 * sum(e.shape)
        for e in weft.expressions(model).values()
        if "adapter:a" in terms_of(e)
    )
    assert nbytes(model) - nbytes(alone) == 2 * own and sites
    weft.activate(model, "b")
    weft.save(model, tmp_path / "out")
    back = weft.load(tmp_path / "out")
    assert nbytes(back) == nbytes(model) and torch.equal(logits(back), logits(model))
    for of in (back, weft.fork(model)):
        for expr in weft.expressions(of).values():
            held = [t.kept for r, t in terms_of(expr).items() if r.startswith("adapter:")]
            first = [t.b if isinstance(t, Mixed) else t.terms["base"].b for t in held]
            assert len({id(t) for t in first}) <= 1


@pytest.mark.parametrize("method", METHODS)
def test_a_task_is_exported_blended_and_merged(method: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    """As a PEFT LoRA to the bit of its pair, as one more adapter, and into the weights."""
    model = weft.load(folder("llama"), dtype=torch.float32)
    weft.apply(model, method, name="a,b", **METHODS[method])
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)
    want = logits(one(model, "a"))
    weft.export(model, tmp_path / "peft", to="peft", adapter="a")
    back = weft.load(folder("llama"), dtype=torch.float32)
    weft.attach(back, tmp_path / "peft", name="a", unverified_base=True)
    torch.testing.assert_close(logits(back), want, rtol=1e-5, atol=1e-5)
    weft.blend_adapters(model, {"a": 0.5, "b": 2.0}, "both")
    weft.activate(model, {"a": 0.5, "b": 2.0})
    mixed = logits(model)
    weft.activate(model, "both")
    torch.testing.assert_close(logits(model), mixed, rtol=1e-4, atol=1e-5)
    weft.activate(model, "a")
    weft.merge(model, to="dense")
    torch.testing.assert_close(logits(model), want, rtol=1e-2, atol=2e-2)


def test_a_new_task_takes_the_inventory_as_it_is() -> None:
    """routing: logits alone train, from their mean; the inventory is that of the tasks before, which keep theirs."""
    model = many("poly")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    weft.apply(model, "poly", name="new", start="routing")
    for expr in weft.expressions(model).values():
        terms: dict[str, Any] = {r.removeprefix("adapter:"): t for r, t in terms_of(expr).items()}
        if "new" not in terms:
            continue
        new, old = terms["new"], terms["a"]
        assert [n for n, p in new.named_parameters() if p.requires_grad] == ["z"]
        assert torch.equal(new.b, old.b) and torch.equal(new.a, old.a) and new.scale == old.scale
        torch.testing.assert_close(new.z.detach(), torch.stack([terms[n].z.detach() for n in NAMES]).mean(0))
    weft.activate(model, "new")
    model(IDS, labels=IDS).loss.backward()
    got = [n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert got and all(n.endswith("adapter:new.kept.z") for n in got)
    assert all(
        torch.equal(p, before[n.replace(".kept", "")])
        for n, p in model.named_parameters()
        if n.replace(".kept", "") in before
    )


def test_what_is_frozen_is_shared_with_the_new_task(tmp_path: Path) -> None:
    """After loading the new task costs its logits alone, and there are no two inventories."""
    weft.save(many("poly"), tmp_path / "out")
    model = weft.load(tmp_path / "out")
    size = nbytes(model)
    weft.apply(model, "poly", name="new", start="routing")
    sites = sum("adapter:new" in terms_of(e) for e in weft.expressions(model).values())
    assert sites and nbytes(model) == size + sites * 4 * 16


def test_the_mean_of_the_inventory_is_an_ordinary_adapter() -> None:
    """average: LoRA of the mean factors, at the inventory's scale; where there is none, of a new one, which is declared."""
    model = many("poly")
    assert not weft.apply(model, "poly", name="new", start="average").fallbacks
    for expr in weft.expressions(model).values():
        terms: dict[str, Any] = terms_of(expr)
        if "adapter:new" in terms:
            new, old = terms["adapter:new"], terms["adapter:a"]
            assert isinstance(new, LowRank) and new.b.requires_grad and new.a.requires_grad
            assert torch.equal(new.b, old.b.mean(0)) and torch.equal(new.a, old.a.mean(0))
    plain = weft.weave(build_tiny("llama"))
    assert weft.apply(plain, "poly", start="average").fallbacks
    with pytest.raises(ConflictError, match="of that name"):
        weft.apply(model, "poly", name="new,a")
