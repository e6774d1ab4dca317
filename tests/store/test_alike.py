"""Models loaded without their classes: what they hold, what a merge of them is, and what is left to their classes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_tiny

import weft
from weft.engine.outline import Outline
from weft.error import ChangedError, NumericError
from weft.model import expressions, places, plain_tensors
from weft.store.alike import alike
from weft.store.bare import Bare

CONFIG = """
merge_method: {method}
base_model: m0
models:
  - {{model: m1, parameters: {{weight: 0.2{more}}}}}
  - {{model: m2, parameters: {{weight: 0.5{more}}}}}
dtype: {dtype}
"""


@pytest.fixture
def family(tmp_path: Path) -> list[Path]:
    """Three models near each other, in bfloat16, of more layers than digits."""
    made: list[Path] = []
    for i in range(3):
        model, g = build_tiny("llama", layers=11), torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=g)
        model.to(torch.bfloat16).save_pretrained(tmp_path / f"m{i}")  # type: ignore[operator]
        made.append(tmp_path / f"m{i}")
    return made


def test_they_hold_what_the_classes_hold(family: list[Path]) -> None:
    """Names, values, dtypes, blocks; the class's name and configuration."""
    found = alike(family)
    assert found is not None
    for path, model in zip(family, found, strict=True):
        whole = weft.load(path)
        assert isinstance(model, Bare) and type(model).__name__ == type(whole).__name__
        ours, theirs = expressions(model), expressions(whole)
        assert set(ours) == set(theirs) and all(torch.equal(ours[n].dense(), e.dense()) for n, e in theirs.items())
        assert {n: p.dtype for n, p in places(model).items()} == {n: p.dtype for n, p in places(whole).items()}
        vectors, wanted = plain_tensors(model), plain_tensors(whole)
        assert set(vectors) == set(wanted)
        assert all(vectors[n].dtype == t.dtype and torch.equal(vectors[n], t) for n, t in wanted.items())
        assert Outline(model).blocks == 11
        assert model.configuration() == json.loads((path / "config.json").read_text())


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "task_arithmetic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_merge_of_them_has_the_same_bytes(
    method: str, dtype: str, family: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without classes; what is written loads, its configuration says the dtype, and it can be merged again."""
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(method=method, dtype=dtype, more=", density: 0.6" if "ties" in method else "")
    (tmp_path / "c.yml").write_text(text if method != "linear" else text.replace("base_model: m0\n", ""))
    weft.merge_config("c.yml", "bare")
    with monkeypatch.context() as m:
        m.setattr("weft.store.alike.alike", lambda *_: None)
        weft.merge_config("c.yml", "whole")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("bare", "whole"))
    assert one.keys() == two.keys()
    assert all(t.dtype == one[n].dtype and torch.equal(t, one[n]) for n, t in two.items())
    assert weft.load(tmp_path / "bare").config.dtype == getattr(torch, dtype)
    assert weft.verify(tmp_path / "bare") == [] and alike([tmp_path / "bare"]) is not None


COMMANDS = {
    "mergekit": ["mergekit", "c.yml"],
    "linear": ["soup", "m0", "m1", "m2"],
    "ties": ["ties", "m1", "m2", "--base", "m0", "--weight", "0.2", "--weight", "0.5"],
    "drawn": ["dare", "m1", "m2", "--base", "m0", "--seed", "3"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_transformers_is_not_imported(case: str, family: list[Path], tmp_path: Path) -> None:
    """By a command that merges what is alike into a folder; what it writes is what merging the classes' models writes."""
    (tmp_path / "c.yml").write_text(CONFIG.format(method="ties", dtype="bfloat16", more=", density: 0.6"))
    (tmp_path / "bare.py").write_text(
        "import sys\nfrom weft.cli import main\ntry:\n    main()\nexcept SystemExit as e:\n"
        "    sys.exit('transformers is here' if 'transformers' in sys.modules else e.code)"
    )
    name, *rest = COMMANDS[case]
    out = ["bare"] if name == "mergekit" else ["--out", "bare"]
    subprocess.run([sys.executable, "bare.py", name, *rest, *out, "--quiet"], cwd=tmp_path, check=True)
    if name == "mergekit":
        return
    models = [weft.load(tmp_path / f"m{i}") for i in range(3)]
    how: dict[str, Any] = {
        "linear": {"models": models},
        "ties": {"models": models[1:], "base": models[0], "weights": [0.2, 0.5]},
        "drawn": {"models": models[1:], "base": models[0], "seed": 3},
    }[case]
    weft.combine_to(tmp_path / "whole", how.pop("models"), name, **how)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("bare", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(t, one[n]) for n, t in two.items())


def edited(path: Path, **said: Any) -> None:
    """Other entries of config.json; those that are None go."""
    held = json.loads((path / "config.json").read_text()) | said
    (path / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v is not None}))


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Other tensors in the file."""
    held = load_file(path / "model.safetensors")
    change(held)
    save_file(held, path / "model.safetensors", {"format": "pt"})


NORM = "model.norm.weight"
OTHERS: dict[str, Callable[[Path], object]] = {
    "another configuration": lambda p: edited(p, rope_theta=1.0),
    "code of its own": lambda p: edited(p, auto_map={"AutoModel": "x.Y"}),
    "codes": lambda p: edited(p, quantization_config={"quant_method": "gptq"}),
    "no class": lambda p: edited(p, architectures=None),
    "two tables that may be tied": lambda p: edited(p, tie_word_embeddings=None),
    "a tensor less": lambda p: tensors(p, lambda held: held.pop(NORM)),
    "another shape": lambda p: tensors(p, lambda held: held.update({NORM: held[NORM][:-1].clone()})),
    "a buffer": lambda p: tensors(p, lambda held: held.update({"model.rotary.inv_freq": torch.ones(3)})),
    "stacked matrices": lambda p: tensors(p, lambda held: held.update({"model.x.weight": torch.ones(2, 3, 4)})),
    "integers": lambda p: tensors(p, lambda held: held.update({"model.x.weight": torch.ones(2, 3).int()})),
    "inputs by outputs": lambda p: tensors(p, lambda held: held.update({"model.c_attn.weight": torch.ones(2, 3)})),
    "a name of a module's own": lambda p: tensors(p, lambda held: held.update({"model.forward.weight": torch.ones(2)})),
    "a name of a matrix's own": lambda p: tensors(
        p, lambda held: held.update({"x.weight": torch.ones(2, 3), "x.in_features.weight": torch.ones(2)})
    ),
    "a name under another": lambda p: tensors(
        p, lambda held: held.update({"model.x.weight": torch.ones(2), "model.x.weight.bias": torch.ones(2)})
    ),
    "no checkpoint": lambda p: (p / "model.safetensors").unlink(),
    "no configuration": lambda p: (p / "config.json").write_text("["),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("every", [False, True])
def test_what_is_not_alike_is_left_to_the_classes(case: str, every: bool, family: list[Path]) -> None:
    """One of them, or all: what is the same everywhere, and usual, needs no class."""
    for path in family if every else family[1:2]:
        OTHERS[case](path)
    usual = every and case in ("another configuration", "a tensor less", "another shape")
    assert (alike(family) is not None) == usual


def test_a_weft_folder_is_left_to_its_class(family: list[Path], tmp_path: Path) -> None:
    model = weft.load(family[1])
    weft.apply(model, "rtn", bits=4)
    weft.save(model, tmp_path / "woven")
    assert alike([family[0], tmp_path / "woven"]) is None


def test_what_weft_wrote_is_checked(family: list[Path], tmp_path: Path) -> None:
    """As by `load`."""
    weft.save(weft.load(family[0]), tmp_path / "saved")
    tensors(tmp_path / "saved", lambda held: held[NORM].add_(1))
    with pytest.raises(ChangedError, match=NORM):
        alike([tmp_path / "saved"])


@pytest.mark.parametrize("which", ["m0", "m2"])
@pytest.mark.parametrize("name", [NORM, "model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_ties"])
def test_values_that_are_not_finite_are_found_where_they_are_merged(
    method: str, name: str, which: str, family: list[Path], tmp_path: Path
) -> None:
    """The error names the weight and the model, and there is no result."""
    tensors(tmp_path / which, lambda held: held[name].flatten()[-1:].fill_(torch.inf))
    config = tmp_path / "merge.yml"
    each = ", ".join(f"{{model: {m}, parameters: {{weight: 0.4}}}}" for m in ("m0", "m1", "m2"))
    if method == "slerp":
        each = f"{{model: m0}}, {{model: {which.replace('m0', 'm1')}}}"
    base = "" if method == "linear" else "base_model: m0\n"
    text = f"merge_method: {method}\n{base}models: [{each}]\nparameters: {{{'t: 0.5' if method == 'slerp' else ''}}}\n"
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NumericError, match="not finite") as e:
        patch.chdir(tmp_path)
        weft.merge_config(config, tmp_path / "out")
    assert name in str(e.value) and any(who in str(e.value) for who in ("base", "member"))
    assert not (tmp_path / "out").exists()
