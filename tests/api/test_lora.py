"""LoRA and what its options make of it, against their formulas; on any base, saved, merged, exported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import weft
from weft.expr import Dense, LowRank, Quantized, terms_of
from weft.expr.weightnorm import WeightNorm

from .cases import logits, values

MODELS = Callable[..., Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 3, "alpha": 5.0, "scaling": "rank"},
    "root": {"rank": 3, "alpha": 5.0, "scaling": "root"},
    "pissa": {"rank": 3, "init": "pissa", "alpha": 2.0},
    "olora": {"rank": 3, "init": "olora", "scaling": "rank"},
    "magnitude": {"rank": 3, "magnitude": True},
    "all": {"rank": 3, "alpha": 4.0, "scaling": "root", "init": "pissa", "magnitude": True},
}
SITE = "model.layers.0.self_attn.q_proj.weight"


def adapted(place: Path, options: dict[str, Any], *, base: str = "") -> nn.Module:
    """A model with an adapter, on a rounded base if that is asked for."""
    model = weft.load(place)
    if base:
        weft.apply(model, base, at="all-linear", group=16)
    weft.apply(model, "lora", **options)
    return model


def moved(model: nn.Module) -> nn.Module:
    """What is trainable, as if it had been trained."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g), alpha=0.05)
    return model


@pytest.mark.parametrize("base", ["", "rtn"])
@pytest.mark.parametrize("case", OPTIONS)
def test_it_starts_where_the_weight_is(folder: MODELS, case: str, base: str) -> None:
    """To the last bit; what starts from singular directions, but for rounding."""
    place = folder(dtype=torch.float32)
    plain = weft.load(place)
    if base:
        weft.apply(plain, base, at="all-linear", group=16)
    model = adapted(place, OPTIONS[case], base=base)
    before, after = values(plain), values(model)
    for name in before:
        if "init" in OPTIONS[case]:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6 * float(before[name].abs().max()))
        else:
            assert torch.equal(after[name], before[name])
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scaling", "factor"), [("constant", 5.0), ("rank", 5 / 4), ("root", 5 / 2)])
def test_the_scale_is_as_its_rule_says(folder: MODELS, scaling: str, factor: float) -> None:
    """alpha, alpha / rank or alpha / sqrt(rank), times B A."""
    model = moved(adapted(folder(), {"rank": 4, "alpha": 5.0, "scaling": scaling}))
    expr = weft.expressions(model)[SITE]
    base, term = terms_of(expr)["base"], terms_of(expr)["adapter:default"]
    assert isinstance(term, LowRank)
    want = base.dense().double() + factor * term.b.double() @ term.a.double()
    torch.testing.assert_close(expr.dense().double(), want, rtol=1e-5, atol=1e-6)


def test_pissa_starts_from_the_largest_singular_directions(folder: MODELS) -> None:
    """s B A is the best approximation of its rank, its halves have like lengths, and only they are trained."""
    model = adapted(folder(dtype=torch.float32), OPTIONS["pissa"])
    terms = terms_of(weft.expressions(model)[SITE])
    u, s, v = torch.linalg.svd(terms["base"].dense().detach().double())
    best = u[:, :3] * s[:3] @ v[:3]
    mine = terms["adapter:default"]
    assert isinstance(mine, LowRank)
    torch.testing.assert_close(mine.dense().detach().double(), best, rtol=0, atol=1e-5 * float(s[0]))
    torch.testing.assert_close(mine.b.norm(dim=0), mine.a.norm(dim=1))
    assert terms["adapter:default-start"].frozen() and not mine.frozen()


def test_a_magnitude_is_trained_apart_from_the_direction(folder: MODELS) -> None:
    """g v / ||v|| of base plus adapter; the gradients are those with the lengths held constant."""
    model = moved(adapted(folder(dtype=torch.float32), OPTIONS["magnitude"]))
    expr = weft.expressions(model)[SITE]
    assert isinstance(expr, WeightNorm) and expr.g.requires_grad
    term = terms_of(expr.v)["adapter:default"]
    assert isinstance(term, LowRank)
    g, b, a = (t.detach().double().requires_grad_() for t in (expr.g, term.b, term.a))
    v = terms_of(expr.v)["base"].dense().detach().double() + b @ a
    want = g[:, None] * v / v.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(expr.dense().double(), want, rtol=1e-5, atol=1e-6)
    x = torch.randn(5, v.shape[1], generator=torch.Generator().manual_seed(1))
    expr(x).square().sum().backward()
    (x.double() @ want.T).square().sum().backward()
    for mine, theirs in ((expr.g, g), (term.b, b), (term.a, a)):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def texts(place: Path) -> str:
    """A file to collect evidence from."""
    made = [f"the {a} {b} on the {c} mat ." for a in ("cat", "dog", "bird") for b in ("sat", "saw") for c in "abcdefgh"]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in made))
    return str(place / "texts.jsonl")


@pytest.mark.parametrize("case", [*OPTIONS, "eva", "corda", "loftq", "lq"])
def test_it_is_saved_and_merged(folder: MODELS, tmp_path: Path, case: str) -> None:
    """Bit for bit when loaded; merged dense it is one matrix, merged onto the grid one rounding of the same grid."""
    options = OPTIONS.get(case, {"rank": 3, "init": case, "data": texts(tmp_path), "cache": tmp_path / "cache"})
    model = moved(adapted(folder(), options, base="rtn"))
    weft.save(model, tmp_path / "saved")
    back = weft.load(tmp_path / "saved")
    assert torch.equal(logits(back), logits(model))
    want = values(model)
    weft.merge(back, to="grid")
    site = weft.expressions(back)[SITE]
    assert isinstance(site, Quantized) and float((site.dense() - want[SITE]).abs().max()) < 0.2
    weft.merge(model, to="dense")
    assert isinstance(weft.expressions(model)[SITE], Dense)
    torch.testing.assert_close(values(model)[SITE].float(), want[SITE].float(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_reads_it(folder: MODELS, tmp_path: Path, case: str) -> None:
    """As an ordinary LoRA: alpha from the scale, and twice the rank for what started from singular directions."""
    peft = pytest.importorskip("peft")
    place = folder(dtype=torch.float32)
    model = moved(adapted(place, OPTIONS[case]))
    weft.export(model, tmp_path / "adapter", to="peft")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=0, atol=1e-4)
    again = weft.load(place)
    weft.attach(again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_two_scales_are_one_adapter_for_peft(folder: MODELS, tmp_path: Path) -> None:
    """The second one's scale goes into its factor."""
    place = folder(dtype=torch.float32)
    model = adapted(place, {"rank": 2, "alpha": 3.0, "name": "one"})
    weft.apply(model, "lora", rank=2, alpha=math.pi, name="two")
    weft.export(moved(model), tmp_path / "adapter", to="peft")
    back = weft.load(place)
    weft.attach(back, tmp_path / "adapter")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)


def test_a_frozen_base_keeps_nothing_dense(folder: MODELS) -> None:
    """Behind a magnitude too: what is kept for the backward is smaller than the weight."""
    model = adapted(folder(hidden_size=64, intermediate_size=512), OPTIONS["magnitude"], base="rtn")
    expr = weft.expressions(model)["model.layers.0.mlp.up_proj.weight"]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        expr(torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert all(t.numel() < math.prod(expr.shape) for t in kept if t.is_floating_point())
