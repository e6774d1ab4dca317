"""Every export gives other tools the same values."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import weft

from .cases import logits, shake, values

MODELS = Callable[..., Path]


def adapted(place: Path, rank: int = 2) -> nn.Module:
    model = weft.load(place)
    weft.apply(model, "lora", rank=rank)
    return shake(model)


def test_hf_is_an_ordinary_checkpoint_of_todays_values(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", bits=4, group=16)
    weft.apply(model, "lora", rank=2)
    held = dict(weft.expressions(shake(model)))
    assert weft.export(model, tmp_path / "out") == []
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(read[n], v.to(torch.bfloat16)) for n, v in values(model).items())
    assert all(weft.expressions(model)[n] is e for n, e in held.items())
    assert weft.verify(tmp_path / "out") == []
    assert {r.expression for r in weft.show(weft.load(tmp_path / "out"))} == {"bfloat16"}


def test_hf_of_an_embedding_model(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder("bert", dtype=torch.float32))
    weft.apply(model, "rtn", bits=8, group=0)
    weft.export(model, tmp_path / "out", to="hf")
    ids = torch.arange(2, 22).view(2, 10)
    read = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(read(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5)


def test_peft_gives_the_same_logits(folder: MODELS, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    place = folder(dtype=torch.float32)
    model = adapted(place)
    weft.apply(model, "lora", rank=3, name="second", at="*.mlp.*")
    shake(model, seed=1)
    weft.export(model, tmp_path / "out", to="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 and set(config["rank_pattern"].values()) == {5}
    assert config["base_model_name_or_path"] == str(place) and config["task_type"] == "CAUSAL_LM"
    read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place), tmp_path / "out")
    assert torch.allclose(logits(read), logits(model), atol=1e-5)
    assert float((logits(model) - logits(weft.load(place))).abs().max()) > 0.1
    named = {k: v.to("cpu") for k, v in read.state_dict().items() if "lora_" in k}
    assert len(named) == len(load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_peft_of_a_loaded_weft_folder_names_the_pretrained_base(folder: MODELS, tmp_path: Path) -> None:
    place = folder(dtype=torch.float32)
    weft.save(adapted(place), tmp_path / "tuned")
    weft.export(weft.load(tmp_path / "tuned"), tmp_path / "out", to="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place)


def test_peft_refuses_another_base_unless_it_is_written_beside(folder: MODELS, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = weft.load(folder(dtype=torch.float32))
    weft.apply(model, "rtn", bits=3, group=16)
    weft.apply(model, "lora", rank=2)
    shake(model)
    with pytest.raises(weft.WeftError, match=r"base=.FOLDER"):
        weft.export(model, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()
    weft.export(model, tmp_path / "out", to="peft", base=tmp_path / "base")
    read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.allclose(logits(read), logits(model), atol=1e-5)
    with pytest.raises(weft.WeftError, match="exists already"):
        weft.export(model, tmp_path / "out", to="peft", base=tmp_path / "base2")
    assert not (tmp_path / "base2").exists()


def test_peft_refuses_what_is_no_lora(folder: MODELS, tmp_path: Path) -> None:
    plain = weft.load(folder())
    with pytest.raises(weft.WeftError, match="no adapter"):
        weft.export(plain, tmp_path / "out", to="peft")
    weft.apply(plain, "lora", at="*embed*", rank=2)
    with pytest.raises(weft.WeftError, match=r"tied") as e:
        weft.export(plain, tmp_path / "out", to="peft")
    assert "embed_tokens" in str(e.value)


def test_formats_and_bases_are_checked(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder())
    with pytest.raises(weft.WeftError, match="unknown export format"):
        weft.export(model, tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(weft.WeftError, match="base"):
        weft.export(model, tmp_path / "out", to="hf", base=tmp_path / "b")
    weft.export(model, tmp_path / "out")
    with pytest.raises(weft.WeftError, match="exists already"):
        weft.export(model, tmp_path / "out")
    weft.export(model, tmp_path / "out", replace=True)


def test_names_of_everything_exported() -> None:
    held: dict[str, Any] = {n: getattr(weft, n) for n in weft.__all__}
    assert all(callable(v) for v in held.values())
    assert set(weft.__all__) <= set(dir(weft))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = weft.nothing_here  # type: ignore[attr-defined]
    importlib.import_module("weft.methods.quantize.rtn")
    assert callable(weft.methods)
