"""The start token of tokenizers that have one: every text, prompt and window begins with it, once."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import weft
from weft.lab.distance import windows
from weft.lab.metrics import bits_per_byte
from weft.learn.data import IGNORE, Chat, Response, Text, encode
from weft.learn.tokenizer import behind, opening
from weft.model import weave

TEXT = "the cat sat on the mat . a dog ran"


@pytest.fixture
def llama(words: Any) -> Any:
    """The word tokenizer, with a start token that it puts before texts and chats."""
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(words)
    made.add_special_tokens({"bos_token": "<begin>"})
    start = ("<begin>", made.bos_token_id)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[start])
    made.chat_template = (
        "<begin>{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}"
        "{% if m['role'] == 'assistant' %} <end>{% endif %}{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
    )
    return made


def ids(words: Any, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


def test_an_opening_is_what_stands_before_texts(words: Any, llama: Any) -> None:
    """An end that a tokenizer puts behind them is none, and one that is written out counts once."""
    assert opening(words) == [] and opening(llama) == [llama.bos_token_id]
    assert behind(llama, f"<begin> {TEXT}", opening(llama)) == behind(llama, TEXT, opening(llama)) == ids(llama, TEXT)
    assert behind(words, TEXT, []) == ids(words, TEXT)


def test_a_prompt_begins_as_for_generation(llama: Any) -> None:
    """As the tokenizer makes it for `generate`, also where its start is lost; an answer without a prompt is predicted whole."""
    (e,) = encode([Response(TEXT, "yes .")], llama, length=32)
    asked = llama(TEXT)["input_ids"]
    assert e.input_ids[: len(asked)] == asked and e.labels == [IGNORE] * len(asked) + e.input_ids[len(asked) :]
    (short,) = encode([Response(TEXT, "yes .")], llama, length=7)
    assert short.input_ids == asked[:1] + e.input_ids[-6:] and short.labels == [IGNORE, *e.labels[-6:]]
    (bare,) = encode([Response("", "yes .")], llama, length=7)
    assert bare.input_ids == [llama.bos_token_id, *bare.labels[1:]] and bare.labels[1:] == [
        *ids(llama, "yes ."),
        llama.eos_token_id,
    ]


@pytest.mark.parametrize("text", [TEXT, f"<begin> {TEXT}"])
@pytest.mark.parametrize("length", [2, 3, 5, 100])
def test_every_window_of_a_text_begins_so(text: str, length: int, llama: Any) -> None:
    """And every token of it is a target, once."""
    made = encode([Text(text)], llama, length=length)
    assert all(e.input_ids[0] == llama.bos_token_id and e.labels[0] == IGNORE for e in made)
    assert all(e.labels[1:] == e.input_ids[1:] and len(e.input_ids) <= length for e in made)
    assert [t for e in made for t in e.labels[1:]] == [*ids(llama, TEXT), llama.eos_token_id]


@pytest.mark.parametrize("length", [6, 9, 64])
def test_a_long_chat_keeps_its_beginning(length: int, llama: Any) -> None:
    """The template's own start token, and the last tokens."""
    turns = (("user", "the cat ?"), ("assistant", "yes ."), ("user", "a dog ?"), ("assistant", "no no ."))
    (whole,), (e,) = (encode([Chat(turns)], llama, length=n) for n in (64, length))
    assert whole.input_ids.count(llama.bos_token_id) == 1
    kept = len(e.input_ids) - 1
    assert len(e.input_ids) == min(length, len(whole.input_ids)) and e.labels == [IGNORE, *whole.labels[-kept:]]
    assert e.input_ids == [llama.bos_token_id, *whole.input_ids[-kept:]]


def test_windows_to_calibrate_on_begin_so(llama: Any) -> None:
    """They are as long as without it."""
    rows = torch.cat([b["input_ids"] for b in windows([TEXT] * 9, llama, length=8, tokens=48)])
    assert rows.shape == (6, 8) and (rows[:, 0] == llama.bos_token_id).all()
    assert rows[:, 1:].flatten().tolist() == ([*ids(llama, TEXT), llama.eos_token_id] * 9)[:42]


@pytest.mark.parametrize("length", [3, 64])
def test_texts_are_scored_behind_it(length: int, llama: Any, tiny: Any) -> None:
    """The first token is predicted from it, and others from it and what of the window stands before them."""
    model = weave(tiny("llama", max_position_embeddings=128))
    (value,), (size,) = bits_per_byte(model, llama, [TEXT], length=length)
    text, nats = ids(llama, TEXT), 0.0
    for at in range(len(text)):
        first = at - at % length
        seen = [llama.bos_token_id, *text[max(0, first - 1) : at]]
        with torch.no_grad():
            nats -= float(model(input_ids=torch.tensor([seen])).logits[0, -1].log_softmax(-1)[text[at]])  # type: ignore[operator]
    assert value * size == pytest.approx(nats / math.log(2), rel=1e-5)


def test_a_reader_begins_with_it(llama: Any, words: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with the end of text, where texts have no start token."""
    model = weave(tiny("llama", max_position_embeddings=128))
    for tokenizer, start in ((llama, llama.bos_token_id), (words, words.eos_token_id)):
        monkeypatch.setattr("weft.training.tokenizer", lambda _, held=tokenizer: held)
        assert weft.reader(model).seen.tolist() == [start]
