"""The script that makes the lab model, end to end on a few files and a few steps."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from weft.lab import corpora, models
from weft.store import load

SCRIPT = Path(__file__).parents[2] / "scripts" / "ref_lm.py"


@pytest.fixture(scope="module")
def ref_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ref_lm", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ref_lm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(ref_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow model of two layers, so that a step takes milliseconds."""
    config = ref_lm.config()
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8})
    monkeypatch.setattr(ref_lm, "config", lambda: config)


@pytest.fixture(scope="module")
def data(ref_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ref-lm") / "corpus"
    ref_lm.main(["corpus", "--out", str(out), "--train", "jinja2", "--held-out", "filelock", "--files", "2"])
    return out


def test_the_lab_tests_on_what_the_model_has_not_seen(ref_lm: Any) -> None:
    assert set(ref_lm.HELD_OUT) == set(corpora.HELD_OUT)
    assert not set(ref_lm.HELD_OUT) & set(ref_lm.TRAIN)


def test_the_corpus_decodes_to_the_files(ref_lm: Any, data: Path) -> None:
    corpus = ref_lm.Corpus.read(data)
    words = ref_lm.Tokenizer.from_file(str(corpus.tokenizer))
    assert (words.token_to_id("<|end|>"), words.token_to_id("<|pad|>")) == (0, 1)
    ends = np.flatnonzero(corpus.held_out == 0)
    texts = {p.read_text("utf8") for _, p in ref_lm.python_files("filelock")}
    assert words.decode(corpus.held_out[: ends[0]].tolist()) in texts
    about = json.loads((data / "corpus.json").read_text("utf8"))
    assert about["held_out"]["files"] == len(ends) and about["held_out"]["tokens"] == len(corpus.held_out)


def test_copies_of_a_file_are_dropped(ref_lm: Any, tmp_path: Path) -> None:
    text = "".join(f"the_name_of_variable_{i} = {i}\n" for i in range(40))
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "c.py").write_text(text.replace("variable", "function"))
    kept = ref_lm.unlike([(n, tmp_path / f"{n}.py") for n in "abc"], set())
    assert [n for n, _ in kept] == ["a", "c"]


def test_an_epoch_has_every_window_once(ref_lm: Any) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    data = ref_lm.Windows(tokens, 16)
    for epoch in (0, 1):
        targets = data.batch(epoch * data.count, data.count)[:, 1:].flatten()
        assert len(targets.unique()) == len(targets) == data.count * 16
    assert torch.equal(data.batch(5, 3), ref_lm.Windows(tokens, 16).batch(5, 3))


def test_the_rate_warms_up_stays_and_decays(ref_lm: Any) -> None:
    s = ref_lm.Settings(tokens=1)
    assert [ref_lm.rate(s, 0, 0.0), ref_lm.rate(s, 100, 0.3)] == [1 / 40, 1]
    assert ref_lm.rate(s, 100, 0.775) == pytest.approx(0.5) and ref_lm.rate(s, 100, 1.0) == 1e-3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_is_pytorchs(ref_lm: Any, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(w) for w in torch.randn(*shape).repeat(2, 1, 1))
    a = ref_lm.Muon([mine], lr=0.1)
    b = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        mine.grad = theirs.grad = torch.randn(shape)
        a.step()
        b.step()
    assert (mine - theirs).norm() < 0.01 * theirs.norm()  # theirs is in bfloat16


def test_a_resumed_run_is_the_uninterrupted_one(ref_lm: Any, data: Path, small: None, tmp_path: Path) -> None:
    settings = ref_lm.Settings(tokens=4 * 2 * 32, batch=2, length=32, warm_up=2)
    corpus = ref_lm.Corpus.read(data)
    whole, first, second = (ref_lm.Run(corpus, settings, "cpu") for _ in range(3))
    for _ in range(4):
        whole.step()
    first.step()
    first.step()
    first.save(tmp_path)
    second.resume(tmp_path)
    second.step()
    second.step()
    assert second.progress == whole.progress == 1
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_writes_a_model_that_loads_and_an_interrupt_a_checkpoint(
    ref_lm: Any,
    data: Path,
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model"
    args = ["train", "--data", str(data), "--out", str(out), "--tokens", "320", "--batch", "2", "--length", "32"]
    step = ref_lm.Run.step

    def interrupted(run: Any) -> torch.Tensor:
        if run.steps == 2:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(ref_lm.Run, "step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        ref_lm.main(args)
    assert not out.exists()
    monkeypatch.setattr(ref_lm.Run, "step", step)
    ref_lm.main([*args, "--resume", f"{out}.checkpoint"])
    about = json.loads((out / "training.json").read_text("utf8"))
    assert (about["steps"], about["tokens"]) == (5, 320)
    load(out)
    capsys.readouterr()
    ref_lm.main(["evaluate", str(out), "--data", str(data), "--tokens", "700"])
    bits = float(capsys.readouterr().out.split()[0])
    assert 0 < bits < math.log2(4096) * 2


def test_the_model_is_the_one_that_is_shipped(ref_lm: Any) -> None:
    shipped = json.loads((Path(models.resolve("ref-lm")) / "config.json").read_text("utf8"))
    made = ref_lm.config().to_dict()
    parts = ("num_", "hidden_", "inter", "vocab", "tie_", "max_", "head_", "rms_", "rope_")
    shape = [k for k in shipped if k.startswith(parts)]
    assert {k: made[k] for k in shape} == {k: shipped[k] for k in shape}


def test_bits_per_byte_of_a_flat_model(ref_lm: Any, data: Path, small: None) -> None:
    """Equal logits give log2(vocab) bits a token, whole windows and the rest alike."""
    corpus = ref_lm.Corpus.read(data)
    model = ref_lm.LlamaForCausalLM(ref_lm.config())
    torch.nn.init.zeros_(model.lm_head.weight)
    bits = ref_lm.bits_per_byte(model, corpus, "cpu", length=64, most=300)
    assert bits == pytest.approx(12 / corpus.bytes_per_token, rel=1e-4)
