"""Load, apply, train, evaluate, generate, show, save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weft
from weft.progress import Bars

from .cases import logits, values

MODELS = Callable[..., Path]
LINES = ["the cat sat on the mat .", "a dog ran under the old tree .", "the red bird flew over a hill ."]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    place = tmp_path / "texts.jsonl"
    rows = [{"text": " ".join(LINES[(i + k) % 3] for k in range(6)) + " " + "the " * i} for i in range(24)]
    place.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    place = tmp_path / "pairs.jsonl"
    words = ["cat", "dog", "bird", "mat", "hill", "tree"]
    rows = [{"query": f"the {a} {b}", "positive": f"a {a} sat on {b}"} for a in words for b in words]
    place.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


def test_evidence_comes_from_the_data_and_is_kept(folder: MODELS, texts: Path, tmp_path: Path) -> None:
    model = weft.load(folder())
    made = weft.apply(model, "gptq", bits=3, group=16, at="*.mlp.*", data=str(texts), tokens=512, cache=tmp_path / "c")
    assert len(made) == 6 and made.fallbacks == []
    assert all(
        c.error is not None and 0 < c.error < 1 and c.before == "bfloat16" and c.after == "int3[g16]" for c in made
    )
    assert len(list((tmp_path / "c" / "evidence").glob("*/index.json"))) == 1
    again = weft.load(folder())
    weft.apply(again, "gptq", bits=3, group=16, at="*.mlp.*", data=str(texts), tokens=512, cache=tmp_path / "c")
    assert all(torch.equal(values(model)[n], v) for n, v in values(again).items())
    assert len(list((tmp_path / "c" / "evidence").glob("*/index.json"))) == 1


def test_where_methods_go_by_default(folder: MODELS) -> None:
    model = weft.load(folder())
    assert len(weft.apply(model, "rtn", group=16)) == 15
    assert len(weft.apply(model, "lora", rank=2)) == 14
    assert {r.expression for r in weft.show(model)} == {"int4[g16]", "int4[g16] + adapter:default: LowRank(2)"}


def test_bad_requests_are_refused(folder: MODELS) -> None:
    model = weft.load(folder())
    for bad, text in [
        (lambda: weft.apply(model, "gptqq"), "unknown method"),
        (lambda: weft.apply(model, "rtn", bits=9), "bits"),
        (lambda: weft.apply(model, "rtn", at="*.nope"), "matches no site"),
        (lambda: weft.apply(model, "knapsack"), "does not change a model"),
        (lambda: weft.load("nowhere-at-all"), "no such model"),
        (lambda: weft.train(model, []), "nothing is trainable"),
        (lambda: weft.evaluate(model, "no-file.jsonl"), "no data there"),
    ]:
        with pytest.raises(weft.WeftError, match=text):
            bad()


def test_training_lowers_the_score_and_survives_saving(folder: MODELS, texts: Path, tmp_path: Path) -> None:
    model = weft.load(folder())
    weft.apply(model, "rtn", at="all-linear", bits=4, group=16)
    weft.apply(model, "lora", rank=4)
    before = weft.evaluate(model, str(texts), limit=12)
    weft.train(model, str(texts), steps=20, batch=4, length=64, lr=2e-2)
    after = weft.evaluate(model, str(texts), limit=12)
    assert after["mean"] < before["mean"] and after["low"] <= after["mean"] <= after["high"]
    assert after["documents"] == 12 and after["metric"] == "bits per byte"
    weft.save(model, tmp_path / "out")
    assert torch.equal(logits(weft.load(tmp_path / "out")), logits(model))
    assert weft.verify(tmp_path / "out") == []
    (tmp_path / "out" / "config.json").write_text("{}")
    assert weft.verify(tmp_path / "out") != []


def test_embedding_models_are_scored_by_retrieval(folder: MODELS, pairs: Path, texts: Path) -> None:
    model = weft.load(folder("bert", dtype=torch.float32))
    found = weft.evaluate(model, str(pairs))
    assert found["metric"] == "bits per query" and found["mean"] > 0 and found["documents"] == 36
    assert 0 < found["mean reciprocal rank"] <= 1
    assert len(weft.apply(model, "lora", rank=2)) == 13
    for bad in (lambda: weft.evaluate(model, str(texts)), lambda: weft.generate(model, "the")):
        with pytest.raises(weft.WeftError, match="this model"):
            bad()


def test_greedy_text_is_that_of_the_plain_model(folder: MODELS) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = folder(dtype=torch.float32)
    words, plain = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place)
    ids = words("the cat", return_tensors="pt")["input_ids"]
    want = plain.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert weft.generate(weft.load(place), "the cat", 8) == words.decode(want, skip_special_tokens=True)


def test_a_chat_is_asked_in_the_template(folder: MODELS) -> None:
    """As the template asks for an answer, whatever the tokenizer puts before texts; without a template it is refused."""
    from transformers import AutoTokenizer

    place = folder(dtype=torch.float32)
    with pytest.raises(weft.WeftError, match="chat template"):
        weft.generate(weft.load(place), "the cat", 8, chat=True)
    words = AutoTokenizer.from_pretrained(place)
    words.chat_template = (
        "{{ messages[0]['role'] }} : {{ messages[0]['content'] }}{% if add_generation_prompt %} . a{% endif %}"
    )
    words.save_pretrained(place)
    model = weft.load(place)
    ids = words("user : the cat . a", add_special_tokens=False, return_tensors="pt")["input_ids"]
    want = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]  # type: ignore[operator]
    assert weft.generate(model, "the cat", 8, chat=True) == words.decode(want, skip_special_tokens=True)


def test_ref_lm_shrinks_and_still_writes(tmp_path: Path) -> None:
    model = weft.load("ref-lm")
    whole = sum(r.bytes for r in weft.show(model))
    weft.apply(model, "rtn", at=["*.0.mlp.*", "*.0.self_attn.*"], bits=8, group=0)
    assert sum(r.bytes for r in weft.show(model)) < whole
    said = weft.generate(model, "import os\nimport ", 8)
    assert said and said == weft.generate(model, "import os\nimport ", 8)
    weft.export(model, tmp_path / "out", to="compressed-tensors")
    assert weft.verify(tmp_path / "out") == []


def test_progress_is_reported(
    folder: MODELS, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weft.apply(weft.load(folder()), "rtn", group=16, progress=Bars())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Bars, "first", 0.0)
    weft.apply(weft.load(folder()), "rtn", group=16, progress=Bars())
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("rtn: 1/15") and shown[-1].startswith("rtn: 15/15")


def test_methods_are_listed_with_their_kind() -> None:
    found = {m.name: m for m in weft.methods()}
    assert found["gptq"].verb == "quantize" and found["gptq"].kind == "rewrite" and found["gptq"].paper == "2210.17323"
    assert found["knapsack"].kind == "search" and all(m.help and m.kind for m in found.values())
    from weft.engine import get

    assert all(
        (get(m.name).kind, get(m.name).verb, get(m.name).paper) == (m.kind, m.verb, m.paper) for m in found.values()
    )
