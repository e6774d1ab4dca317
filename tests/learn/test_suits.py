"""Models of every kind and examples of every kind: what cannot be learnt is refused, with the reason, before any work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import weft
from weft.error import ConflictError, OptionError
from weft.learn.data import Example, Pair, Response, Text
from weft.model import fingerprint, weave

SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
T5 = t.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
CLIP = t.CLIPConfig(
    text_config={**SIZE, "bos_token_id": 0, "eos_token_id": 0},
    vision_config={**{k: v for k, v in SIZE.items() if k in ("hidden_size", "intermediate_size")}, "num_hidden_layers": 1,
                   "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
    projection_dim=16,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "words": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZE)),
    "embeddings": lambda: t.BertModel(t.BertConfig(**SIZE)),
    "labels": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZE)),
    "labels of words": lambda: t.BertForTokenClassification(t.BertConfig(**SIZE)),
    "last labels": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**SIZE)),
    "gaps": lambda: t.BertForMaskedLM(t.BertConfig(**SIZE)),
    "spans": lambda: t.BertForQuestionAnswering(t.BertConfig(**SIZE)),
    "both sides": lambda: t.T5ForConditionalGeneration(T5),
    "images too": lambda: t.CLIPModel(CLIP),
}
TEXTS: list[Example] = [Response("the cat", "sat on the mat .")] * 4
EXAMPLES: dict[str, list[Example]] = {"texts": TEXTS, "pairs": [Pair("the cat", "a dog")] * 4}
RIGHT = {("words", "texts"), ("embeddings", "pairs")}


@pytest.fixture
def made(words: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model with an adapter, and the word tokenizer for all."""
    for place in ("training", "score"):
        monkeypatch.setattr(f"weft.{place}.tokenizer", lambda _: copy.deepcopy(words))

    def make(name: str) -> Any:
        torch.manual_seed(0)
        model = weave(MODELS[name]().eval())
        weft.apply(model, "lora", rank=2)
        return model

    return make


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_and_is_scored_on_what_it_is_for(name: str, kind: str, made: Any) -> None:
    """Texts for what writes, pairs for what embeds; anything else is refused and leaves the model as it was."""
    model = made(name)
    tries = (
        lambda: weft.train(model, EXAMPLES[kind], steps=1, batch=2, length=16),
        lambda: weft.evaluate(model, EXAMPLES[kind]),
    )
    if (name, kind) in RIGHT:
        for go in tries:
            go()
        return
    was = fingerprint(model)
    for go in tries:
        with pytest.raises(ConflictError):
            go()
    assert fingerprint(model) == was


def test_what_is_missing_of_the_inputs_is_said(made: Any) -> None:
    """What was written, of an encoder-decoder; images, of a model that compares them; outputs that are none that is known."""
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for name, said in (("both sides", "decoder_input_ids"), ("images too", "pixel_values"), ("spans", "start_logits")):
        with pytest.raises(ConflictError, match=said):
            weft.apply(made(name), "gptq", bits=4, group=0, data=[ids])


def test_texts_beyond_a_models_positions_are_refused(made: Any) -> None:
    """With the number that it has; weft's own texts are cut to it."""
    model = made("embeddings")
    with pytest.raises(ConflictError, match="64"):
        weft.apply(model, "gptq", bits=4, group=0, data=[{"input_ids": torch.full((1, 65), 5)}])


def test_calibration_fits_a_models_positions(made: Any, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of a masked model with few positions."""
    from weft.fitting.data import batches

    found = batches([Text("the cat sat . " * 60)], made("gaps"), words, length=256, tokens=256)
    assert {b["input_ids"].shape[1] for b in found} == {64}


@pytest.mark.parametrize("name", [n for n in MODELS if n != "words"])
def test_only_what_writes_generates_and_reads_on(name: str, made: Any) -> None:
    """An encoder-decoder writes, but cannot read on."""
    model = made(name)
    if name != "both sides":
        with pytest.raises(ConflictError):
            weft.generate(model, "the cat", 2)
        with pytest.raises(ConflictError):
            weft.reader(model, name="new", start=0)
    else:
        assert isinstance(weft.generate(model, "the cat", 2), str)
        with pytest.raises(ConflictError, match="decoder_input_ids"):
            weft.reader(model, name="new", start=0).read(torch.tensor([5, 6]))


def test_a_model_in_memory_is_no_name(made: Any, tmp_path: Path) -> None:
    """`weft.fit` and `weft.load` want a folder."""
    for go in (lambda: weft.fit(made("words"), tmp_path / "out", budget="50%"), lambda: weft.load(made("words"))):
        with pytest.raises(OptionError, match="by name"):
            go()
