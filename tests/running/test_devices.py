"""A woven model is moved, cast, copied, dispatched and checkpointed like any other; what cannot be right is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from laws.cases import EXPRS, nodes_in, rng
from tiny import build_tiny, output
from torch import Tensor, nn

import weft
from weft.engine.run import Step, apply
from weft.error import ConflictError, OptionError, ResourceError
from weft.expr import NODES, build, spec, tensors
from weft.model import devices, fingerprint, weave
from weft.stats.walker import forward
from weft.store import load, save

from .processes import IDS, adapted, step

BASES = {"dense": (), "int4": ("rtn",), "nf4": ("nf4",), "sparse int4": ("magnitude", "rtn")}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed model on disk."""
    model = weave(build_tiny("llama-tied"))
    apply(model, [Step.of("rtn", group=8)])
    save(model, tmp_path / "model")
    return tmp_path / "model"


@bases
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_packed_bytes_alone(base: tuple[str, ...], cast: str) -> None:
    """`.to(dtype)`, `.half()`, `.double()`: the same bytes, other floats, an output close to the first."""
    model = adapted(*base)
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    before = output(model, BATCH)
    getattr(model, cast)()
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[cast]
    held = dict(model.named_parameters())
    assert all(torch.equal(held[n], p) for n, p in packed.items()) and bool(packed) == bool(base)
    assert {p.dtype for n, p in held.items() if n not in packed} == {dtype} and model.dtype == dtype
    assert model.lm_head.weight.dtype == dtype
    made = output(model, BATCH)
    assert made.dtype == dtype
    loose = 1e-4 if cast == "double" else 0.1
    torch.testing.assert_close(made.float(), before, rtol=loose, atol=loose)


@bases
def test_a_deep_copy_is_its_own(base: tuple[str, ...]) -> None:
    """Equal at first; training one leaves the other; ties hold in the copy."""
    model = adapted(*base, family="llama-tied")
    other = copy.deepcopy(model)
    mark = fingerprint(model)
    assert fingerprint(other) == mark and other.lm_head.expr is other.model.embed_tokens.expr
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    step(other, IDS)
    assert not shared and fingerprint(model) == mark != fingerprint(other)


@bases
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(base: tuple[str, ...], reentrant: bool) -> None:
    """Of adapters and of the inputs, through a frozen base, whichever way blocks are run again."""
    grads: list[dict[str, Tensor]] = []
    for on in (False, True):
        model = adapted(*base).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        vectors = model.model.embed_tokens(IDS).detach().requires_grad_()
        model(inputs_embeds=vectors, labels=IDS, use_cache=False).loss.backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append({**named, "inputs": vectors.grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 29
    assert all(torch.equal(g, grads[1][n]) and bool(g.any()) for n, g in grads[0].items())


def test_packed_weights_are_not_made_trainable() -> None:
    """Refused before any parameter is changed; freezing works, and so does a model without packed weights."""
    model = adapted("rtn")
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConflictError, match="packed weights"):
        model.requires_grad_(True)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert not any(p.requires_grad for p in model.requires_grad_(False).parameters())
    assert all(p.requires_grad for p in adapted().requires_grad_(True).parameters())


@pytest.mark.parametrize("where", ["cpu", "auto", torch.device("cpu"), {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_model_is_loaded_onto_devices(where: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without accelerators all of these are the CPU."""
    monkeypatch.setattr(accelerate.utils.modeling, "get_max_memory", lambda *_: {"cpu": 1 << 30})
    model = weft.load(folder, device_map=where)
    assert fingerprint(model) == fingerprint(load(folder)) and {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("disk", "offloaded"),
        ({"": "meta"}, "offloaded"),
        ({"model": "cpu", "lm_head": "disk"}, "offloaded"),
        ("nowhere", "no such device"),
        ({"model": "cpu", "lm_head": "cuda:99"}, "no such device"),
        ({"model": "cpu"}, "no device"),
        ({"model": "cpu", "lm_head": "cpu", "nothing": "cpu"}, "no such part"),
    ],
)
def test_what_is_no_place_for_weights_is_refused(where: Any, what: str) -> None:
    """Offloading, parts left out, parts that do not exist."""
    with pytest.raises(OptionError, match=what):
        devices.dispatch(weave(build_tiny()), where)


def test_auto_refuses_a_model_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than leave a part on disk."""
    monkeypatch.setattr(accelerate.utils.modeling, "get_max_memory", lambda *_: {"cpu": 1 << 12})
    with pytest.raises(ResourceError, match="does not fit"):
        devices.dispatch(weave(build_tiny()), "auto")


@bases
def test_accelerates_hooks_change_nothing(base: tuple[str, ...]) -> None:
    """With the hooks that several devices need on every module: output, gradients, a rewrite, and a copy."""
    model, plain = adapted(*base), adapted(*base)
    table = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    accelerate.dispatch_model(model, table, force_hooks=True)
    assert any(hasattr(m, "_hf_hook") for m in model.model.layers.modules())
    (a, b), (c, d) = step(model, IDS), step(plain, IDS)
    assert torch.equal(a, c) and b.keys() == d.keys() and all(torch.equal(g, d[n]) for n, g in b.items())
    apply(model, [Step.of("rtn", bits=3, group=8)])
    apply(plain, [Step.of("rtn", bits=3, group=8)])
    assert torch.equal(output(model, BATCH), output(plain, BATCH))


def test_nodes_make_nothing_on_another_device() -> None:
    """Every value stays where the tensors are. What looks at values cannot be tried without memory."""
    seen, ids = set[str](), torch.zeros(2, dtype=torch.long, device="meta")
    for name, make in EXPRS.items():
        made = make(16, 8, rng("device", name))
        held = {k: t.detach().to("meta") for k, t in tensors(made).items()}
        expr = build(spec(made), held.__getitem__)
        if (kinds := nodes_in(expr)) & {"Basis"}:
            continue
        seen |= kinds
        tried: list[Callable[[], Tensor | None]] = [
            expr.dense,
            expr.mask,
            lambda e=expr: e(torch.ones(3, e.shape[1], device="meta")),
        ]
        if not kinds & {"SparseDelta", "Blocks"}:
            tried += [lambda e=expr: e.rows(ids), lambda e=expr: e.take(slice(0, 3)).dense()]
        for act in tried:
            value = act()
            assert value is None or value.device.type == "meta", name
    assert seen == set(NODES) - {"Basis", "Routed"}


def test_a_batch_on_another_device_is_refused() -> None:
    """Evidence and scores say so before torch does."""
    model = weave(build_tiny())
    with pytest.raises(ConflictError, match="different devices"):
        forward(nn.Module.to(model, "meta"), {"input_ids": IDS})
