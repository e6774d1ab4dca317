"""Every kind of architecture goes through every stage of a woven model's life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.engine.run import Step, apply
from weft.expr import Dense
from weft.model import expressions, fingerprint, fork, unweave, weave
from weft.model.experts import ApartExperts
from weft.stats import collect
from weft.store import load, save
from weft.store.checkpoint import checkpoint

from .zoo import DIFFUSION, GENERATE, MODELS, batch, build, output, read

every = pytest.mark.parametrize("name", MODELS)


def run(model: nn.Module, name: str) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        return output(model.eval(), batch(name))


@every
def test_a_woven_model_computes_the_same(name: str) -> None:
    """And nearly all of its numbers are in expressions."""
    plain = build(name)
    total = sum(p.numel() for p in plain.parameters())
    woven = weave(build(name))
    torch.testing.assert_close(run(woven, name), run(plain, name), rtol=1e-5, atol=1e-6)
    assert sum(e.shape[0] * e.shape[1] for e in expressions(woven).values()) > 0.9 * total


@every
def test_unweaving_gives_the_plain_model_back(name: str) -> None:
    """Every tensor and every class, bit for bit; also the first values after a rewrite."""
    plain = build(name)
    woven = weave(build(name))
    kinds = [type(m) for m in plain.modules()]
    for original in (False, True):
        if original:
            apply(woven, [Step.of("rtn", group=8)])
        made = unweave(woven, original=original)
        assert [type(m) for m in made.modules()] == kinds
        assert made.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(made.state_dict()[k], v) for k, v in plain.state_dict().items())
        assert torch.equal(run(made, name), run(plain, name))
        woven = weave(made)


@every
def test_checkpoints_are_those_of_its_library(name: str, tmp_path: Path) -> None:
    """weft reads what transformers or diffusers writes; what weft writes has the same names and shapes, and they read it."""
    plain = build(name)
    plain.save_pretrained(tmp_path / "theirs")
    woven = load(tmp_path / "theirs")
    torch.testing.assert_close(run(woven, name), run(plain, name), rtol=1e-5, atol=1e-6)
    save(woven, tmp_path / "ours")
    stem = "diffusion_pytorch_model" if name in DIFFUSION else "model"
    theirs, ours = (checkpoint(tmp_path / folder, stem) for folder in ("theirs", "ours"))
    assert {n: e.shape for n, e in ours.entries.items()} == {n: e.shape for n, e in theirs.entries.items()}
    back, info = read(name, tmp_path / "ours")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(run(back, name), run(plain, name), rtol=1e-5, atol=1e-6)
    assert fingerprint(load(tmp_path / "ours")) == fingerprint(woven)


@every
def test_a_compressed_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """Every weight rewritten; what is loaded is the same to the last bit, and knows its first values."""
    build(name).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    first = {n: e.dense().clone() for n, e in expressions(model).items()}
    apply(model, [Step.of("rtn", group=8)])
    save(model, tmp_path / "small")
    back = load(tmp_path / "small")
    assert fingerprint(back) == fingerprint(model) and torch.equal(run(back, name), run(model, name))
    assert all(torch.equal(weft.model.site(back, n).original, w.float()) for n, w in first.items())
    weft.export(model, tmp_path / "plain")
    with torch.no_grad():
        plain = read(name, tmp_path / "plain")[0].eval()
    torch.testing.assert_close(run(plain, name), run(model, name), rtol=1e-4, atol=1e-5)


@every
def test_a_step_of_training_moves_adapters_alone(name: str) -> None:
    """On every weight but embeddings, compressed first; a fork is not moved."""
    model = weave(build(name))
    at = [n for n, p in weft.model.places(model).items() if p.kind != "embedding"]
    apply(model, [Step.of("rtn", group=8), Step.of("lora", rank=2)], at=at)
    other = fork(model)
    before, parameters = fingerprint(other), dict(model.named_parameters())
    held = {n: p.detach().clone() for n, p in parameters.items()}
    grown = torch.optim.SGD([p for p in parameters.values() if p.requires_grad], lr=0.1)
    output(model.train(), batch(name)).square().mean().backward()
    grown.step()
    moved = {n for n, p in parameters.items() if not torch.equal(p, held[n])}
    assert moved and all(".adapter:default.b" in n for n in moved) and fingerprint(other) == before
    assert len(moved) >= 0.5 * len(at)


@pytest.mark.parametrize("name", GENERATE)
def test_generation_is_that_of_the_plain_model(name: str) -> None:
    """Greedy, with the cache."""
    inputs: dict[str, Any] = {k: v for k, v in batch(name).items() if k != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(weave(build(name)).generate(**inputs, **options), build(name).generate(**inputs, **options))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek"])
def test_experts_are_sites_of_their_own(name: str, tmp_path: Path) -> None:
    """Three matrices an expert over the stack's own storage; each with the evidence of the tokens that it was given."""
    plain = build(name)
    stacks = {p.data_ptr() for n, p in plain.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    model = weave(plain)
    layers = [n for n, m in model.named_modules() if isinstance(m, ApartExperts)]
    held = {n: e for n, e in expressions(model).items() if ".experts." in n}
    assert len(held) == 3 * 4 * len(layers) and layers
    assert {e.w.untyped_storage().data_ptr() for e in held.values() if isinstance(e, Dense)} <= stacks
    inputs = batch(name)
    stats = collect(model, [inputs], tmp_path)
    tokens = {n: stats.evidence([n])[n][0].tokens for n in held}
    for layer in layers:
        counts = sorted(c for n, c in tokens.items() if n.startswith(layer))
        assert sum(counts) == 3 * inputs["input_ids"].numel() * 2 and counts[::3] == counts[1::3] == counts[2::3]
