"""Adapters that stand around weights: factors (IA3, OFT) and magnitudes (DoRA) are switched, deleted, named and saved as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import weft
from tests.tiny import build_tiny
from weft.error import ConflictError
from weft.expr import Dense, Diagonal
from weft.expr.named import Named
from weft.model.sites import set_vectors

from .test_adapters import logits, moved

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("ia3", {}),
    "oft": ("oft", {"block": 4}),
    "dora": ("lora", {"rank": 3, "magnitude": True}),
    "dora from pissa": ("lora", {"rank": 3, "magnitude": True, "init": "pissa"}),
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("rtn", {"bits": 4, "group": 16, "symmetric": False}),
    "nf4": ("nf4", {}),
    "2:4": ("magnitude", {"pattern": "2:4"}),
}


def based(base: str) -> nn.Module:
    model = weft.weave(build_tiny("llama"))
    if base:
        weft.apply(model, BASES[base][0], at="all-linear", **BASES[base][1])
    return model


def adapted(model: nn.Module, way: str, name: str, seed: int = 0) -> nn.Module:
    """With one more adapter, as if it had been trained."""
    model.requires_grad_(False)
    weft.apply(model, WAYS[way][0], name=name, **WAYS[way][1])
    return moved(model, seed)


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("base", ["", *BASES])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_switched_and_deleted(way: str, base: str, mode: Any, tmp_path: Path) -> None:
    """Off, and without it, the model gives what the base gives, to the bit; saved, it stays as it was left."""
    plain = based(base)
    want = logits(weft.fork(plain))
    model = adapted(plain, way, "a")
    weft.mode(model, mode)
    made = logits(model)
    assert not torch.allclose(made, want, atol=1e-3)
    held = weft.fork(model)
    weft.activate(model, [])
    assert torch.equal(logits(model), want) and weft.adapters(model)["a"].strength == 0
    assert torch.equal(logits(held), made)
    weft.save(model, tmp_path / "off")
    back = weft.load(tmp_path / "off")
    torch.testing.assert_close(logits(back), want, rtol=0, atol=1e-4)
    weft.activate(back, "a")
    torch.testing.assert_close(logits(back), made, rtol=0, atol=1e-4)
    weft.activate(model, "a")
    assert torch.equal(logits(model), made)
    weft.rename_adapter(model, "a", "b")
    assert list(weft.adapters(model)) == ["b"] and torch.equal(logits(model), made)
    places = weft.adapters(model)["b"].places
    assert weft.delete_adapter(model, "b") == list(places) and weft.adapters(model) == {}
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("second", [*WAYS, "lora"])
@pytest.mark.parametrize("first", WAYS)
def test_two_of_them_are_told_apart(first: str, second: str) -> None:
    """Each alone is what it is on a model that never had the other."""
    alone = logits(adapted(based("int4"), first, "a"))
    model = adapted(based("int4"), first, "a")
    model.requires_grad_(False)
    if second == "lora":
        weft.apply(model, "lora", name="b", rank=2)
    else:
        weft.apply(model, WAYS[second][0], name="b", **WAYS[second][1])
    moved(model, 1)
    both = logits(model)
    weft.activate(model, "a")
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-5)
    weft.activate(model, ["a", "b"])
    assert torch.equal(logits(model), both)
    weft.delete_adapter(model, "b")
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_off_has_no_gradient(way: str) -> None:
    model = adapted(based("int4"), way, "a")
    ids = torch.arange(6)[None]
    assert model(input_ids=ids).logits.requires_grad
    weft.activate(model, [])
    assert not model(input_ids=ids).logits.requires_grad


@pytest.mark.parametrize("way", ["ia3", "oft", "dora"])
def test_one_is_exported_by_name(way: str, tmp_path: Path) -> None:
    """Whether it is on or off, and whatever stands beside it."""
    plain = adapted(based(""), way, "a")
    weft.export(plain, tmp_path / "alone", to="peft")
    model = adapted(based(""), way, "a")
    model.requires_grad_(False)
    weft.apply(model, "lora", name="b", rank=2)
    weft.activate(moved(model, 1), "b")
    weft.export(model, tmp_path / "one", to="peft", adapter="a")
    one, alone = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "alone"))
    assert one.keys() == alone.keys() and all(torch.equal(one[k], t) for k, t in alone.items())
    back = based("")
    weft.attach(back, tmp_path / "one", name="c")
    torch.testing.assert_close(logits(back), logits(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConflictError, match="an adapter of this name"):
        weft.attach(back, tmp_path / "one", name="c")
    weft.activate(back, [])
    assert torch.equal(logits(back), logits(based("")))


def test_a_factor_whose_bias_was_scaled_stays() -> None:
    """As PEFT's IA3 has it: without the factor, the bias would be another."""
    model = adapted(weft.weave(build_tiny("bert")), "ia3", "a")
    site = next(n for n in weft.expressions(model) if n.endswith("key.weight"))
    side = next(f for f in weft.expressions(model)[site].kids() if isinstance(f, Named))
    assert isinstance(side.kept, Diagonal)
    name = site.replace(".weight", ".bias")
    with torch.no_grad():
        model.get_parameter(name).fill_(0.5)
        first = model.get_parameter(name).clone()
        set_vectors(model, {name: Dense((first * side.kept.d)[None])})
    for change in (lambda: weft.activate(model, []), lambda: weft.delete_adapter(model, "a")):
        with pytest.raises(ConflictError, match=name.replace(".", r"\.")):
            change()
    weft.activate(model, "a")


def test_what_stands_around_weights_is_not_blended() -> None:
    model = adapted(based(""), "ia3", "a")
    with pytest.raises(ConflictError, match="around weights"):
        weft.blend_adapters(model, {"a": 0.5}, "b")
