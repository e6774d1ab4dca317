"""An attached adapter gives what it gave where it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft.expr import LowRank, Quantized, terms_of
from weft.model import match
from weft.store.adapter import attach

from .cases import logits, shake

MODELS = Callable[..., Path]
LINEAR = 14


@pytest.fixture
def place(tmp_path: Path, tiny: Callable[..., nn.Module]) -> Path:
    """A tiny float32 checkpoint of two layers."""
    tiny().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def foreign(place: Path, tmp_path: Path) -> Callable[..., Tensor]:
    """Writes an adapter with PEFT and gives PEFT's own logits: `foreign(r=2, lora_alpha=5)`."""
    peft = pytest.importorskip("peft")

    def make(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        given = {"init_lora_weights": False, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **settings}
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place), peft.LoraConfig(**given))
        model.save_pretrained(tmp_path / "adapter")
        return logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), tmp_path / "adapter"))

    return make


def exported(place: Path, out: Path, **at: Any) -> Tensor:
    """An adapter that weft trained and wrote; its model's logits."""
    model = weft.load(place)
    weft.apply(model, "lora", rank=3, **at)
    weft.export(shake(model), out, to="peft")
    return logits(model)


def roles(model: nn.Module) -> dict[str, list[str]]:
    """The terms of every site."""
    return {n: list(terms_of(e)) for n, e in weft.expressions(model).items()}


def test_an_exported_adapter_comes_back(place: Path, tmp_path: Path) -> None:
    """To the bit, frozen, at the sites that it was made for; the saved model keeps it."""
    want = exported(place, tmp_path / "adapter", at="all-linear")
    model = weft.load(place)
    before = logits(model)
    sites = attach(model, tmp_path / "adapter")
    assert sites == match(model, "all-linear") and len(sites) == LINEAR
    assert torch.equal(logits(model), want) and not torch.allclose(want, before, atol=0.1)
    assert not any(p.requires_grad for p in model.parameters())
    weft.save(model, tmp_path / "saved")
    assert torch.equal(logits(weft.load(tmp_path / "saved")), want)


def test_an_attached_adapter_is_exported_again(place: Path, tmp_path: Path) -> None:
    """The same tensors under the same names."""
    exported(place, tmp_path / "adapter", at="*.mlp.*")
    model = weft.load(place)
    attach(model, str(tmp_path / "adapter"), name="other")
    weft.export(model, tmp_path / "again", to="peft")
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_an_adapter_behind_turns_is_turned_with_them(place: Path, tmp_path: Path) -> None:
    """It was made for inputs before the turns, and gives the same there."""
    want = exported(place, tmp_path / "adapter", at="all-linear")
    model = weft.load(place)
    weft.apply(model, "online_hadamard")
    before = logits(model)
    assert len(attach(model, tmp_path / "adapter")) == LINEAR
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, want, atol=0.1)
    weft.untap(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_two_adapters_add_up(place: Path, tmp_path: Path) -> None:
    """Each under its own name; both at one site make one sum."""
    exported(place, tmp_path / "one", at="q_proj")
    exported(place, tmp_path / "two", at=["q_proj", "up_proj"])
    model = weft.load(place)
    base = weft.expressions(model)["model.layers.0.self_attn.q_proj.weight"].dense()
    attach(model, tmp_path / "one", name="one")
    attach(model, tmp_path / "two", name="two")
    terms = terms_of(weft.expressions(model)["model.layers.0.self_attn.q_proj.weight"])
    assert list(terms) == ["base", "adapter:one", "adapter:two"]
    whole = weft.expressions(model)["model.layers.0.self_attn.q_proj.weight"].dense()
    assert torch.equal(whole, base + terms["adapter:one"].dense() + terms["adapter:two"].dense())
    assert roles(model)["model.layers.1.mlp.up_proj.weight"] == ["base", "adapter:two"]


def test_an_adapter_of_a_written_base_fits_that_base_alone(place: Path, tmp_path: Path) -> None:
    """Exported from a quantized model with its base beside it."""
    model = weft.load(place)
    weft.apply(model, "rtn", bits=3, group=16)
    weft.apply(model, "lora", rank=2, at="all-linear")
    want = logits(shake(model))
    weft.export(model, tmp_path / "adapter", to="peft", base=tmp_path / "base")
    with pytest.raises(weft.WeftError, match="other weights"):
        attach(weft.load(place), tmp_path / "adapter")
    read = weft.load(tmp_path / "base")
    attach(read, tmp_path / "adapter")
    assert torch.allclose(logits(read), want, atol=1e-5)


def test_a_quantized_base_keeps_its_codes(place: Path, tmp_path: Path) -> None:
    """The adapter is a term beside them, also where the model was saved and loaded."""
    exported(place, tmp_path / "adapter", at="q_proj")
    model = weft.load(place)
    weft.apply(model, "rtn", bits=4, group=16, at="all-linear")
    codes = dict(weft.expressions(model))
    weft.save(model, tmp_path / "small")
    loaded = weft.load(tmp_path / "small")
    assert attach(model, tmp_path / "adapter") == attach(loaded, tmp_path / "adapter")
    for name, expr in weft.expressions(model).items():
        base = terms_of(expr)["base"]
        assert base is codes[name]
        if "q_proj" in name:
            term = terms_of(expr)["adapter:default"]
            assert isinstance(base, Quantized) and isinstance(term, LowRank)
            assert torch.equal(expr.dense(), base.dense() + term.dense())
    assert torch.equal(logits(loaded), logits(model))


SETTINGS: dict[str, dict[str, Any]] = {
    "a list": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "full paths": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"],
    },
    "all": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "a regular expression": {"r": 3, "lora_alpha": 5, "target_modules": r".*layers\.1.*\.(q|v)_proj"},
    "rank-stabilised": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "ranks and alphas by name": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "v_proj": 5},
        "alpha_pattern": {"v_proj": 2, "layers.0.self_attn.v_proj": 7, "mlp.up_proj": 1},
    },
    "stabilised ranks by name": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["o_proj"],
        "rank_pattern": {"layers.1.self_attn.o_proj": 7},
    },
    "some layers": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "the first layer of a stack": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
    },
    "with exceptions": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["layers.0.self_attn.k_proj"],
    },
    "another start": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_peft_wrote_gives_pefts_logits(
    case: str, place: Path, tmp_path: Path, foreign: Callable[..., Tensor]
) -> None:
    """Its own folder, under each setting that changes which modules or which scale."""
    want = foreign(**SETTINGS[case])
    model = weft.load(place)
    before = logits(model)
    sites = attach(model, tmp_path / "adapter")
    assert 2 * len(sites) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.allclose(logits(model), want, atol=1e-5)
    assert case == "another start" or not torch.allclose(want, before, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_lose_nothing(
    dtype: torch.dtype, place: Path, tmp_path: Path, foreign: Callable[..., Tensor]
) -> None:
    """The factors are the file's, whatever the scale."""
    foreign(r=2, lora_alpha=5, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {k: t.to(dtype) for k, t in load_file(path).items()}
    save_file(held, path, {"format": "pt"})
    model = weft.load(place)
    (first, *_) = attach(model, tmp_path / "adapter")
    term = terms_of(weft.expressions(model)[first])["adapter:default"]
    stem = f"base_model.model.{first.removesuffix('.weight')}"
    assert isinstance(term, LowRank) and term.scale == 2.5
    assert all(torch.equal(t, held[f"{stem}.lora_{half}.weight"]) for half, t in (("A", term.a), ("B", term.b)))


def test_a_model_that_was_woven_by_hand_takes_what_its_folder_takes(place: Path, tmp_path: Path) -> None:
    """transformers' own model of the same folder has the same fingerprint."""
    want = exported(place, tmp_path / "adapter", at="all-linear")
    model = weft.weave(AutoModelForCausalLM.from_pretrained(place).eval())
    attach(model, tmp_path / "adapter")
    assert torch.allclose(logits(model), want, atol=1e-6)


def test_the_folder_may_go_afterwards(place: Path, tmp_path: Path) -> None:
    """The model's tensors are its own."""
    want = exported(place, tmp_path / "adapter", at="all-linear")
    model = weft.load(place)
    attach(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(model), want)
