"""compressed-tensors checkpoints: what its own package unpacks is what weft holds, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import weft
from weft.error import ConflictError

from .cases import logits

MODELS = Callable[..., Path]
SCHEMES = {
    "int4 g16": {"bits": 4, "group": 16},
    "int4 g16 asymmetric": {"bits": 4, "group": 16, "symmetric": False},
    "int4 channel": {"bits": 4, "group": 0},
    "int8 g8 asymmetric": {"bits": 8, "group": 8, "symmetric": False},
    "int8 channel": {"bits": 8, "group": 0},
    "int8 channel asymmetric": {"bits": 8, "group": 0, "symmetric": False},
}


def unpacked(place: Path) -> dict[str, torch.Tensor]:
    """Every packed weight, by the package."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    said = json.loads((place / "config.json").read_text())["quantization_config"]
    content = load_file(place / "model.safetensors")
    tool: Any = compressors.PackedQuantizationCompressor
    made: dict[str, torch.Tensor] = {}
    for group in said["config_groups"].values():
        scheme = quantization.QuantizationScheme.model_validate(group)
        for key in content:
            path, _, leaf = key.rpartition(".")
            if leaf == "weight_packed" and (group["targets"] == ["Linear"] or path in group["targets"]):
                held = {k.removeprefix(f"{path}."): t for k, t in content.items() if k.startswith(f"{path}.weight")}
                made[f"{path}.weight"] = tool.decompress(held, scheme)["weight"]
    return made


def same(model: Any, place: Path, dtype: torch.dtype) -> int:
    held = weft.expressions(model)
    found = unpacked(place)
    assert all(torch.equal(v, held[n].dense().to(dtype)) and v.dtype == dtype for n, v in found.items())
    return len(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_package_unpacks_the_same_values(folder: MODELS, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = weft.load(folder(dtype=dtype))
    weft.apply(model, "rtn", at="*.mlp.*", **SCHEMES[scheme])
    notes = weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert same(model, tmp_path / "out", dtype) == 6
    assert bool(notes) == ("asymmetric" in scheme)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["ignore"] and "model.layers.0.self_attn.q_proj" in said["ignore"]
    assert weft.verify(tmp_path / "out") == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_loads_what_the_note_says(folder: MODELS, tmp_path: Path, scheme: str) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", at="all-linear", **SCHEMES[scheme])
    notes = weft.export(model, tmp_path / "out", to="compressed-tensors")
    weft.export(model, tmp_path / "dense")
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if notes else {}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
    assert torch.equal(logits(read), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))


def test_several_schemes_in_one_checkpoint(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", at="*.mlp.*", bits=4, group=16)
    weft.apply(model, "rtn", at="*.self_attn.*", bits=8, group=0)
    assert weft.export(model, tmp_path / "out", to="compressed-tensors") == []
    assert same(model, tmp_path / "out", torch.bfloat16) == 14
    weft.export(model, tmp_path / "dense")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(read), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")))
    weft.apply(model, "rtn", at="*.q_proj", bits=4, group=16, symmetric=False)
    notes = weft.export(model, tmp_path / "mixed", to="compressed-tensors")
    assert len(notes) == 1 and "several schemes" in notes[0]
    assert same(model, tmp_path / "mixed", torch.bfloat16) == 14


def test_embeddings_are_written_plain_and_said_so(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", bits=4, group=16)
    notes = weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert len(notes) == 1 and "embed_tokens" in notes[0]
    table = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(table, weft.expressions(model)["model.embed_tokens.weight"].dense().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("rtn", {"bits": 3, "group": 16}, "4 and 8 bits only"),
        ("nf4", {"group": 16}, "4 and 8 bits only"),
        ("rtn", {"bits": 4, "group": 12}, "do not divide"),
        ("magnitude", {"pattern": "2:4"}, "zero patterns"),
        ("lora", {"rank": 2}, "one term a weight"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    folder: MODELS, tmp_path: Path, method: str, options: dict[str, Any], reason: str
) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", at="all-linear", bits=4, group=16)
    weft.apply(model, method, at="*.1.self_attn.o_proj", **options)
    with pytest.raises(weft.WeftError, match=reason) as e:
        weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert "model.layers.1.self_attn.o_proj.weight" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_nothing_to_pack_is_refused(folder: MODELS, tmp_path: Path) -> None:
    with pytest.raises(weft.WeftError, match="nothing here can be packed"):
        weft.export(weft.load(folder()), tmp_path / "out", to="compressed-tensors")


def test_scales_that_float16_cannot_hold_are_refused(folder: MODELS, tmp_path: Path) -> None:
    model = weft.load(folder(dtype=torch.float16))
    weft.apply(model, "rtn", at="*.mlp.*", bits=4, group=16)
    weft.export(model, tmp_path / "good", to="compressed-tensors")
    assert same(model, tmp_path / "good", torch.float16) == 6
    expr: Any = weft.expressions(model)["model.layers.0.mlp.up_proj.weight"]
    tiny = type(expr).encode(expr.codes(), expr.scales() * 1e-7, None, grid="int4", group=16)
    from weft.model import set_expressions

    set_expressions(model, {"model.layers.0.mlp.up_proj.weight": tiny})
    with pytest.raises(weft.WeftError, match="scales do not fit"):
        weft.export(model, tmp_path / "bad", to="compressed-tensors")


def test_int8_tokens_are_written_for_readers_that_round_them(folder: MODELS, tmp_path: Path) -> None:
    """The codes and scales of the weight are weft's; a reader rounds each token under a scale of its own, which is noted."""
    model = weft.load(folder("llama", dtype=torch.float32))
    weft.apply(model, "rtn", at="all-linear", bits=8, group=0)
    weft.apply(model, "act_quant", at="*.mlp.*")
    notes = weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert len(notes) == 1 and "127.5" in notes[0] and weft.verify(tmp_path / "out") == []
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    assert {g["format"]: len(g["targets"]) for g in said["config_groups"].values()} == {
        "int-quantized": 6,
        "pack-quantized": 8,
    }
    held = load_file(tmp_path / "out" / "model.safetensors")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits(read)  # the first pass unpacks
    for name, expr in weft.expressions(model).items():
        if ".mlp." in name:
            path = name.removesuffix(".weight")
            codes, value = held[name], expr.dense()
            assert codes.dtype == torch.int8 and torch.equal(codes.float() * held[f"{path}.weight_scale"], value)
            x = torch.randn(1, 5, expr.shape[1]) * torch.tensor([[0.1], [1], [1], [10], [100]])
            step = x.abs().amax(-1, keepdim=True) / 127.5
            want = (x / step).round().clamp(-128, 127) * step @ value.T
            with torch.no_grad():
                torch.testing.assert_close(read.get_submodule(path)(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "chain",
    [
        [("rtn", {"bits": 8, "group": 0}), ("act_quant", {"per": "tensor"})],
        [("rtn", {"bits": 8, "group": 0}), ("act_quant", {"grid": "int4"})],
        [("rtn", {"bits": 8, "group": 0}), ("act_quant", {"scale": "e8m0"})],
        [("rtn", {"bits": 8, "group": 0, "symmetric": False}), ("act_quant", {})],
        [("rtn", {"bits": 8, "group": 8}), ("act_quant", {})],
        [("rtn", {"bits": 4, "group": 0}), ("act_quant", {})],
        [("act_quant", {})],
        [("online_hadamard", {}), ("rtn", {"bits": 8, "group": 0})],
    ],
)
def test_other_taps_are_refused_by_name(
    folder: MODELS, tmp_path: Path, chain: list[tuple[str, dict[str, Any]]]
) -> None:
    """Every site that reads through one."""
    model = weft.load(folder("llama"))
    weft.apply(model, "rtn", at="*.self_attn.*", bits=8, group=0)
    for method, options in chain:
        weft.apply(model, method, at="*.mlp.*", **options)
    with pytest.raises(ConflictError, match="what this weight reads") as e:
        weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert len(set(re.findall(r"model\.layers\.\d\.mlp\.\w+", str(e.value)))) == 6 and not (tmp_path / "out").exists()
