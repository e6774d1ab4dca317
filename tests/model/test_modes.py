"""The two modes: the same outputs, and copies that no rewrite, cast, save, merge or training ever leaves stale."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import weft
from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError
from weft.expr import Dense, tensors
from weft.model import expressions, fingerprint, fork, is_woven, mode, set_expressions, unweave, weave

CHAINS = {"plain": (), "int4": ("rtn",), "nf4 of half": ("magnitude", "nf4"), "with adapter": ("rtn", "lora")}


def woven(tiny: Any, family: str = "llama-tied", chain: str = "int4") -> Any:
    """A tiny woven model, rewritten; its adapter, where it has one, is not zero."""
    model = weave(tiny(family))
    for name in CHAINS[chain]:
        options = {"rank": 2} if name == "lora" else {}
        apply(model, [Step.of(name, **options)], at="all-linear" if name == "lora" else "*")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    return model


def copies(model: Any) -> list[torch.Tensor]:
    """Every derived tensor."""
    return [t for e in expressions(model).values() for t in e.derived()]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the order of sums."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", CHAINS)
def test_both_modes_give_the_same(family: str, chain: str, tiny: Any, batches: Any, run: Any) -> None:
    """Outputs agree, values are untouched, and going back gives the first outputs to the bit."""
    model, batch = woven(tiny, family, chain), batches(1)[0]
    mark, before = fingerprint(model), run(model, batch)
    assert mode(model, "speed").mode == "speed"
    same(run(model, batch), before)
    assert fingerprint(model) == mark
    assert mode(model, "memory").mode == "memory" and not copies(model)
    assert torch.equal(run(model, batch), before)


def test_bytes_are_counted(tiny: Any) -> None:
    """speed: one copy a site in the dtype that is computed in, ties once; a plain weight of that dtype is its own copy."""
    model = woven(tiny)
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    want = sum(e.shape[0] * e.shape[1] * 4 for e in expressions(model).values())
    assert mode(model).derived == 0 and mode(model).stored == sum(held.values()) == mode(model).total
    assert mode(model, "speed").derived == want
    assert mode(woven(tiny, chain="plain"), "speed").derived == 0
    assert mode(model.to(torch.bfloat16)).derived == 0
    assert mode(model, "speed").derived == want // 2


def test_an_unknown_mode_and_a_plain_model_are_refused(tiny: Any) -> None:
    """By name."""
    with pytest.raises(OptionError, match="mode"):
        mode(weave(tiny()), "fast")  # type: ignore[arg-type]
    with pytest.raises(ConflictError):
        mode(tiny(), "speed")


def test_a_copy_goes_with_its_expression(tiny: Any, batches: Any, run: Any) -> None:
    """After rewrites, and for a tied weight in both its uses, what runs is the new value."""
    model, batch = woven(tiny), batches(1)[0]
    mode(model, "speed")
    run(model, batch)
    apply(model, [Step.of("rtn", bits=2)])
    now = run(model, batch)
    assert mode(model, "memory").mode == "memory"
    same(now, run(model, batch))


@pytest.mark.parametrize("name", ["memory", "speed"])
def test_casting_and_loading_drop_copies(name: Any, tiny: Any, batches: Any, run: Any) -> None:
    """`.to()` and load_state_dict in place leave no stale copy or layout behind."""
    model, other, batch = woven(tiny), woven(tiny), batches(1)[0]
    for e in expressions(other).values():
        for t in tensors(e).values():
            t[: len(t) // 2] = t[len(t) // 2 :].flip(0)[: len(t) // 2]
    mode(model, name)
    before = run(model, batch)
    model.load_state_dict(other.state_dict())
    now = run(model, batch)
    assert not torch.allclose(now, before, rtol=1e-2, atol=1e-2)
    same(now, run(other, batch))
    assert not copies(model.to(torch.bfloat16))
    assert run(model, batch).dtype == torch.bfloat16


def test_copies_are_not_saved(tiny: Any, words: Any, batches: Any, run: Any, tmp_path: Path) -> None:
    """A folder written in speed mode is that of memory mode; nothing derived is in state_dict, deepcopy or a fork."""
    model, batch = woven(tiny), batches(1)[0]
    keys, before = set(model.state_dict()), run(model, batch)
    mode(model, "speed")
    assert set(model.state_dict()) == keys
    weft.save(model, tmp_path / "out", tokenizer=words)
    back = weft.load(tmp_path / "out")
    assert fingerprint(back) == fingerprint(model) and mode(back).mode == "memory"
    same(run(back, batch), before)
    for made in (copy.deepcopy(model), fork(model)):
        assert not copies(made) and fingerprint(made) == fingerprint(model)
        same(run(made, batch), before)


def test_rewriting_a_fork_in_speed_mode_leaves_the_source(tiny: Any, batches: Any, run: Any) -> None:
    """And the other way round."""
    model, batch = woven(tiny), batches(1)[0]
    mode(model, "speed")
    before, other = run(model, batch), fork(model)
    apply(other, [Step.of("rtn", bits=2)])
    assert not torch.equal(run(other, batch), before) and torch.equal(run(model, batch), before)


@pytest.mark.parametrize("original", [False, True])
def test_unweaving_takes_the_copies_along(original: bool, tiny: Any, batches: Any, run: Any) -> None:
    """A model unwoven from speed mode is plain, and woven again it is in memory mode."""
    model, batch = woven(tiny), batches(1)[0]
    mode(model, "speed")
    before = run(model, batch)
    plain = unweave(model, original=original)
    assert not is_woven(plain) and torch.allclose(run(plain, batch), before, rtol=1e-4, atol=1e-4) != original
    assert mode(weave(plain)).mode == "memory"


@pytest.mark.parametrize("to", ["dense", "grid"])
def test_merging_in_speed_mode(to: Any, tiny: Any, batches: Any, run: Any) -> None:
    """The merged value runs, not the copy of what was there."""
    fast, slow, batch = woven(tiny, chain="with adapter"), woven(tiny, chain="with adapter"), batches(1)[0]
    mode(fast, "speed")
    for model in (fast, slow):
        weft.merge(model, to=to, at="q_proj")
    assert fingerprint(fast) == fingerprint(slow)
    same(run(fast, batch), run(slow, batch))


def test_training_in_speed_mode(tiny: Any, batches: Any, run: Any) -> None:
    """Adapters have the gradients of memory mode, train, and are seen; the base has its copy throughout."""
    fast, slow, batch = woven(tiny, chain="with adapter"), woven(tiny, chain="with adapter"), batches(1)[0]
    mode(fast, "speed")
    for model in (fast, slow):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    same(run(fast, batch), run(slow, batch))
    assert copies(fast)


def test_what_begins_to_train_leaves_its_copy(tiny: Any, batches: Any, run: Any) -> None:
    """A frozen term that is made trainable has gradients, and its changes are seen."""
    model, batch = woven(tiny, chain="with adapter"), batches(1)[0]
    adapters = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    mode(model, "speed")
    before = run(model, batch)
    for p in adapters:
        p.requires_grad_()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in adapters)
    for p in adapters:
        p.data.sub_(p.grad, alpha=2.0)
        p.requires_grad_(False)
    after = run(model, batch)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
    mode(model, "memory")
    same(after, run(model, batch))


def test_copies_made_in_inference_mode_serve_training(tiny: Any, batches: Any) -> None:
    """A copy that is first made under inference_mode can be used where gradients are needed."""
    model, batch = woven(tiny, chain="with adapter"), batches(1)[0]
    mode(model, "speed")
    for e in expressions(model).values():
        e.drop_derived()
    with torch.inference_mode():
        model(**batch)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert copies(model)


def test_other_dtypes_run_without_the_copy(tiny: Any) -> None:
    """Inputs of another dtype than the model computes in have the product of memory mode."""
    model = woven(tiny)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    before = layer(x)
    mode(model, "speed")
    assert torch.equal(layer(x), before) and before.dtype == torch.float64


def test_autocast_uses_the_copy(tiny: Any) -> None:
    """Under autocast both modes give bfloat16, and agree."""
    model = woven(tiny)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, model.config.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slow = layer(x)
        mode(model, "speed")
        fast = layer(x)
    assert slow.dtype == fast.dtype == torch.bfloat16
    torch.testing.assert_close(slow, fast, rtol=0.03, atol=0.03)


def test_a_replaced_value_runs(tiny: Any, batches: Any, run: Any) -> None:
    """A plain value put in place of a quantized one is what runs."""
    model, batch = woven(tiny), batches(1)[0]
    mode(model, "speed")
    run(model, batch)
    set_expressions(model, {n: Dense(torch.zeros(e.shape)) for n, e in expressions(model).items()})
    assert not run(model, batch).any()


LAYERS = {
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0)),
    ),
    "conv1d": (
        lambda: nn.Conv1d(4, 6, 3, bias=False),
        torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1)),
    ),
    "gpt2": (lambda: Conv1D(6, 8), torch.randn(3, 8, generator=torch.Generator().manual_seed(2))),
    "embedding": (lambda: nn.Embedding(10, 8), torch.arange(10).view(2, 5)),
    "no bias": (lambda: nn.Linear(8, 6, bias=False), torch.randn(3, 8, generator=torch.Generator().manual_seed(3))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("chain", ["int4", "with adapter", "all trains"])
def test_every_layer_runs_in_both_modes(kind: str, chain: str) -> None:
    """Values and gradients, of inputs and of trainable terms, agree."""
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    model = weave(nn.Sequential(make()))
    apply(model, [Step.of(m, **({"rank": 2} if m == "lora" else {"group": 0})) for m in CHAINS.get(chain, ())])
    for name, p in model.named_parameters():
        if p.requires_grad or (".expr." in f".{name}" and chain == "all trains"):
            p.requires_grad_().data.add_(0.05)
    made: list[list[torch.Tensor]] = []
    for name in ("memory", "speed"):
        mode(model, name)  # type: ignore[arg-type]
        inner = x.clone().requires_grad_() if x.is_floating_point() else x
        y = model(inner)
        leaves = [t for t in (inner, *model.parameters()) if t.requires_grad]
        made.append([y, *(torch.autograd.grad(y.square().sum(), leaves) if leaves else ())])
    assert len(copies(model)) == (chain != "all trains")
    for a, b in zip(*made, strict=True):
        same(a, b)
