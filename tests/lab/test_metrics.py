"""Metrics against direct computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weft.error import FormatError, NumericError
from weft.lab import metrics
from weft.lab.distance import LOGITS, fewer, windows
from weft.lab.metrics import bits_per_byte
from weft.learn.data import Chat, Pair, Response, Text
from weft.model import weave

TEXTS = ["the cat sat on the mat .", "a red bird flew over the old hill , under a blue tree ?", "dog"]


@pytest.fixture
def lm(tiny: Callable[..., nn.Module]) -> nn.Module:
    """A tiny language model."""
    return tiny("llama", max_position_embeddings=128)


@pytest.fixture
def clueless(tiny: Callable[..., nn.Module]) -> nn.Module:
    """A language model to which every token is as likely: each costs log2(96) bits."""
    model = tiny("llama", max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # type: ignore[union-attr]
    return model


def test_bits_per_byte_equal_a_direct_computation(lm: nn.Module, words: Any) -> None:
    """Every token given all before it, the first given the end token; over the text's bytes."""
    values, sizes = metrics.bits_per_byte(lm, words, TEXTS)
    for text, value, size in zip(TEXTS, values, sizes, strict=True):
        ids = torch.tensor([[0, *words(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logp = lm(input_ids=ids).logits.log_softmax(-1)
        nats = -sum(float(logp[0, i - 1, ids[0, i]]) for i in range(1, ids.shape[1]))
        assert size == len(text.encode()) and value * size == pytest.approx(nats / math.log(2), rel=1e-5)


@pytest.mark.parametrize("length", [1, 3, 7, 64])
def test_windows_share_one_token_so_that_each_token_is_predicted_once(
    clueless: nn.Module, words: Any, length: int
) -> None:
    """To a model that knows nothing every token costs the same, so bits count predictions."""
    values, sizes = metrics.bits_per_byte(clueless, words, TEXTS, length=length, batch=2)
    counts = [len(words(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    assert values * sizes == pytest.approx(np.array(counts) * math.log2(96), rel=1e-5)


def test_a_batch_and_its_padding_change_nothing(lm: nn.Module, words: Any) -> None:
    """Texts alone score as texts together."""
    together, _ = metrics.bits_per_byte(lm, words, TEXTS, batch=16)
    alone = [metrics.bits_per_byte(lm, words, [t])[0][0] for t in TEXTS]
    assert together == pytest.approx(np.array(alone), rel=1e-5)


def test_an_empty_text_scores_nothing(lm: nn.Module, words: Any) -> None:
    """No token, no bits, no weight."""
    values, sizes = metrics.bits_per_byte(lm, words, ["", "the cat"])
    assert values[0] == 0 and sizes[0] == 0 and values[1] > 0


def test_response_bits_are_of_the_response_alone(clueless: nn.Module, words: Any) -> None:
    """Prompts cost nothing; the answer and the end token do."""
    examples = [Response("question the cat ?", "answer yes ."), Response("question ?", "no")]
    values, sizes = metrics.response_bits(clueless, words, examples)
    assert list(sizes) == [len("answer yes ."), len("no")]
    assert values * sizes == pytest.approx(np.array([4, 2]) * math.log2(96), rel=1e-5)


def test_response_bits_refuse_what_has_no_response(clueless: nn.Module, words: Any) -> None:
    """Plain text is not an answer; a chat's assistant turns are."""
    with pytest.raises(FormatError, match="no response"):
        metrics.response_bits(clueless, words, [Text("the cat")])
    chat = Chat((("user", "a"), ("assistant", "the cat"), ("user", "b"), ("assistant", "dog")))
    assert metrics._answer(chat) == "the catdog"


def test_retrieval_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1, 2 and 3, and the bits of the right one among three."""
    held = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0], "x": [1.0, 0, 0], "y": [0, 0.5, 0], "z": [0, 0.9, -1]}
    monkeypatch.setattr(metrics, "embeddings", lambda m, t, texts, **_: torch.tensor([held[s] for s in texts]))
    cosines = metrics.similarities(nn.Identity(), None, [Pair("a", "x"), Pair("b", "y"), Pair("c", "z")])
    assert list(metrics.reciprocal_ranks(cosines)) == pytest.approx([1, 1 / 2, 1 / 3])
    values, weights = metrics.bits_per_query(cosines)
    second = 1 + math.exp(0.4 / 0.05) + math.exp(-0.5 / 0.05)
    assert values[1] == pytest.approx(math.log2(second)) and list(weights) == [1, 1, 1]


def test_a_collapsed_model_gains_nothing_and_a_broken_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal embeddings score like guessing; embeddings that are not finite have no score."""
    pairs = [Pair(str(i), f"p{i}") for i in range(8)]
    monkeypatch.setattr(metrics, "embeddings", lambda m, t, texts, **_: torch.ones(len(texts), 3) / 3**0.5)
    cosines = metrics.similarities(nn.Identity(), None, pairs)
    assert metrics.bits_per_query(cosines)[0] == pytest.approx(3)
    assert metrics.reciprocal_ranks(cosines) == pytest.approx(1 / 4.5)
    monkeypatch.setattr(metrics, "embeddings", lambda m, t, texts, **_: torch.full((len(texts), 3), torch.nan))
    with pytest.raises(NumericError, match="not finite"):
        metrics.similarities(nn.Identity(), None, pairs)


def test_embeddings_come_in_the_order_of_the_texts(tiny: Callable[..., nn.Module], words: Any) -> None:
    """Sorting by length inside leaves no trace; vectors have unit length and do not depend on the batch."""
    model = tiny("bert")
    made = metrics.embeddings(model, words, TEXTS)
    assert torch.allclose(made.norm(dim=1), torch.ones(3), atol=1e-5)
    for text, vector in zip(TEXTS, made, strict=True):
        assert torch.allclose(metrics.embeddings(model, words, [text])[0], vector, atol=1e-5)


def test_no_batch_gives_more_logits_than_there_is_room_for(tiny: Any, words: Any) -> None:
    """The model's classes count, not only the tokenizer's words; the score does not depend on the batch."""
    texts = ["the cat sat on the mat . " * 40, "a dog ran . " * 9]
    assert fewer(8, 256, 151936) == 1 and fewer(8, 256, 8192) == 8 and fewer(8, 256, 0) == 8
    assert all(len(b["input_ids"]) == 1 for b in windows(texts, words, length=8, tokens=64, classes=LOGITS))
    model = weave(tiny())
    values = [bits_per_byte(model, words, texts, length=16, batch=b)[0] for b in (1, 16)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
