"""Scores of answers against hand computations and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft.error import ConflictError, FormatError, OptionError, ShapeError
from weft.lab import answers, metrics
from weft.lab.answers import calibration_error, choice_accuracy, choice_shares, exact_match, forgetting
from weft.lab.bootstrap import interval
from weft.learn.data import Chat, Response, Text
from weft.model import fork, weave

PROMPTS = ["the cat", "a dog ran under", "the red bird flew", "a cat", "the old tree on", "hill", "the dog"]


@pytest.fixture
def lm(tiny: Callable[..., nn.Module]) -> nn.Module:
    """A tiny language model."""
    return tiny("llama", max_position_embeddings=128)


def said(model: nn.Module, words: Any, prompt: str, most: int) -> list[int]:
    """Greedy tokens after a prompt, one forward each, without a cache."""
    ids = words(prompt, add_special_tokens=False)["input_ids"]
    made: list[int] = []
    while len(made) < most and (not made or made[-1] != words.eos_token_id):
        with torch.no_grad():
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    return [i for i in made if i != words.eos_token_id]


class Scripted(nn.Module):
    """A model that says what it is told, token by token; the next row of its script for each prompt that it is given."""

    def __init__(self, scripts: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.scripts, self.held = scripts, nn.Parameter(torch.zeros(1))

    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, pad_token_id: int, **_: Any) -> torch.Tensor:
        rows = [self.scripts[tuple(r)][:max_new_tokens] for r in ids.tolist()]
        width = max(map(len, rows))
        made = [r + [pad_token_id] * (width - len(r)) for r in rows]
        return torch.cat([ids, torch.tensor(made)], 1)


def test_exact_match_by_hand(words: Any) -> None:
    """The whole answer and its end count: not a beginning, not more, not another order; space around it does not."""
    end = words.eos_token_id

    def ids(text: str) -> list[int]:
        return words(text, add_special_tokens=False)["input_ids"]

    says = {
        "the cat": [*ids("a dog"), end, *ids("ran")],  # right: what comes after the end is not read
        "the dog": [*ids("a dog ran"), end],  # more than the answer
        "the": [*ids("a"), end],  # less
        "a dog ran": [*ids("dog a"), end],  # another order
        "hill": [*ids("a dog"), end],  # right, white space apart
        "a": ids("a dog") + ids("ran the cat under") * 9,  # never ends
    }
    model = Scripted({tuple(ids(p)): s for p, s in says.items()})
    examples = [Response(p, " a dog \n" if p == "hill" else "a dog") for p in says]
    values, weights = exact_match(model, words, examples)
    assert list(values) == [1, 0, 0, 0, 1, 0] and list(weights) == [1] * 6
    made = interval(values[None], weights[None])
    assert made.mean == pytest.approx(1 / 3) and 0 <= made.low < made.mean < made.high <= 1


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("woven", [False, True])
def test_exact_match_is_greedy_decoding_one_by_one(lm: nn.Module, words: Any, batch: int, woven: bool) -> None:
    """Right where the example wants what the model says, wrong where it wants a word more or another; in any batch."""
    with torch.no_grad():
        lm.lm_head.weight[0] *= 3  # type: ignore[union-attr,index]  # so that answers end
    answered = {p: ids for p in PROMPTS if 0 < len(ids := said(lm, words, p, 12)) < 12}
    assert len({len(ids) for ids in answered.values()}) > 1
    model = weave(fork(lm)) if woven else lm
    right = [Response(p, words.decode(ids)) for p, ids in answered.items()]
    wrong = [Response(e.prompt, other) for e in right for other in (f"{e.response} cat", e.response[:-1])]
    assert exact_match(model, words, right, batch=batch)[0].all()
    assert not exact_match(model, words, wrong, batch=batch)[0].any()


def test_exact_match_refuses_what_has_no_one_answer(lm: nn.Module, words: Any) -> None:
    """Texts, chats, and tokenizers that cannot tell where an answer ends."""
    for other in (Text("the cat"), Chat((("user", "a"), ("assistant", "b")))):
        with pytest.raises(FormatError, match="no one answer"):
            exact_match(lm, words, [other])
    endless = type("Endless", (), {"eos_token_id": None})()
    with pytest.raises(ConflictError, match="no end"):
        exact_match(lm, endless, [Response("the", "cat")])


def test_choices_share_likelihood(lm: nn.Module, words: Any) -> None:
    """p(choice, end | prompt) in float64, over its sum; longer choices have the likelihood of all their tokens."""
    choices = ["cat", "dog ran", "the old tree"]
    made = choice_shares(lm, words, [Response(p, "") for p in PROMPTS], choices)
    for p, row in zip(PROMPTS, made, strict=True):
        asked = words(p, add_special_tokens=False)["input_ids"]
        likely: list[float] = []
        for c in choices:
            ids = [*asked, *words(c, add_special_tokens=False)["input_ids"], words.eos_token_id]
            with torch.no_grad():
                logp = lm(input_ids=torch.tensor([ids])).logits.double().log_softmax(-1)[0]
            likely.append(math.exp(sum(float(logp[i - 1, ids[i]]) for i in range(len(asked), len(ids)))))
        assert row == pytest.approx(np.array(likely) / sum(likely), rel=1e-4)
    with pytest.raises(OptionError, match="choices"):
        choice_shares(lm, words, [Response("the", "")], ["cat"])


SHARES = np.array([[0.9, 0.1], [0.2, 0.8], [0.85, 0.15], [0.35, 0.65], [0.5, 0.5]])


def test_accuracy_by_hand() -> None:
    """Right, wrong, right, right, and half a point for a tie."""
    values, weights = choice_accuracy(SHARES, [0, 0, 0, 1, 1])
    assert list(values) == [1, 0, 1, 1, 0.5] and list(weights) == [1] * 5
    assert choice_accuracy(np.full((8, 4), 0.25), [0] * 8)[0].mean() == 0.25


def test_calibration_error_by_hand() -> None:
    """Bins (0.8, 0.9]: 0.9 and 0.85 right; (0.7, 0.8]: 0.8 wrong; (0.6, 0.7]: 0.65 right; (0.4, 0.5]: 0.5, half right.

    Their gaps 0.125, -0.8, 0.35 and 0, of 2, 1, 1 and 1 documents in 5: 0.25 / 5 + 0.8 / 5 + 0.35 / 5.
    """
    values, weights = calibration_error(SHARES, [0, 0, 0, 1, 1])
    assert list(weights) == [1] * 5 and values == pytest.approx([0.1, 0.8, 0.15, 0.35, 0])
    assert values.mean() == pytest.approx((0.25 + 0.8 + 0.35) / 5)
    one = calibration_error(SHARES, [0, 0, 0, 1, 1], bins=1)[0].mean()
    assert one == pytest.approx(abs(3.5 / 5 - (0.9 + 0.8 + 0.85 + 0.65 + 0.5) / 5))
    with pytest.raises(OptionError, match="bins"):
        calibration_error(SHARES, [0] * 5, bins=0)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_error_is_its_definition(seed: int) -> None:
    """The mean of the documents' values is Σ_b share_b · |accuracy_b − confidence_b|, on random shares."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(4), 300)
    right = rng.integers(0, 4, 300)
    sure, correct, total = shares.max(1), shares.argmax(1) == right, 0.0
    for b in range(10):
        at = (sure > b / 10) & (sure <= (b + 1) / 10)
        total += at.mean() * abs(correct[at].mean() - sure[at].mean()) if at.any() else 0
    assert calibration_error(shares, right.tolist())[0].mean() == pytest.approx(total)


def test_flips_by_hand(words: Any, tiny: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of targets alone, document by document: none, all, and one in three."""
    model, other = nn.Identity(), nn.Linear(1, 1)
    words_of = {"none": [0, 0, 0], "all": [1, 1, 1], "one": [0, 1, 0]}

    def forward(m: nn.Module, asked: dict[str, torch.Tensor]) -> torch.Tensor:
        made = torch.zeros(*asked["input_ids"].shape, 2)
        made[..., 0] = 0.5
        if m is other:
            for i, row in enumerate(asked["input_ids"].tolist()):
                made[i, 1:4, 1] = torch.tensor(words_of[script[row[0]]], dtype=torch.float)
                made[i, 0, 1] = 1.0  # a flip at the prompt, which is no target
        return made

    prompts = ["the", "cat", "dog"]
    script = {words(p, add_special_tokens=False)["input_ids"][0]: n for p, n in zip(prompts, words_of, strict=True)}
    monkeypatch.setattr(metrics, "forward", forward)
    examples = [Response(f"{p} sat", "on a") for p in prompts]  # targets: on, a, end
    values, weights = metrics.flips(model, other, words, examples)
    assert list(values) == pytest.approx([0, 1, 1 / 3]) and list(weights) == [3, 3, 3]


def test_a_model_flips_nothing_of_its_own_and_compression_something(lm: nn.Module, words: Any) -> None:
    """Texts count every token but the first; in any batch; a rounding to 2 bits flips what a direct count says."""
    texts: Sequence[Any] = [Text("the cat sat on the mat . " * n) for n in (1, 2, 5)]
    original = weave(lm)
    small = fork(original)
    weft.apply(small, "rtn", bits=2, group=16)
    assert not metrics.flips(original, original, words, texts)[0].any()
    values, weights = metrics.flips(small, original, words, texts, batch=1)
    for text, value, weight in zip(texts, values, weights, strict=True):
        ids = torch.tensor([[*words(text.text, add_special_tokens=False)["input_ids"], words.eos_token_id]])
        with torch.no_grad():
            differ = small(input_ids=ids).logits.argmax(-1) != original(input_ids=ids).logits.argmax(-1)
        assert weight == ids.shape[1] - 1 and value == pytest.approx(float(differ[0, :-1].double().mean()))
    assert values.any() and list(metrics.flips(small, original, words, texts, batch=3)[0]) == list(values)


def test_forgetting_by_hand(lm: nn.Module, words: Any) -> None:
    """Loss after minus before, document by document; other documents are refused."""
    before, after = (
        (np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 1.0])),
        (np.array([1.5, 2.0, 2.0]), np.array([2.0, 1, 1])),
    )
    values, weights = forgetting(before, after)
    assert list(values) == [0.5, 0, -1] and list(weights) == [2, 1, 1]
    assert interval(values[None], weights[None]).mean == 0
    for other in ((np.ones(2), np.ones(2)), (np.ones(3), np.ones(3))):
        with pytest.raises(ShapeError, match="cannot be compared"):
            forgetting(before, other)
    scores = metrics.bits_per_byte(lm, words, ["the cat", "a dog ran"])
    assert not forgetting(scores, scores)[0].any()


def test_evaluate_tells_how_many_answers_are_exact(lm: nn.Module, words: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """On the lab's tasks with answers; not on files, whose answers may be long."""
    lm.save_pretrained(tmp_path / "m")  # type: ignore[operator]
    words.save_pretrained(tmp_path / "m")
    model = weft.load(tmp_path / "m")
    made = weft.evaluate(model, "sorting", limit=20)
    assert made["metric"] == "bits per byte of the response" and made["documents"] == 20
    assert made["exact match"] == 0 and made["low"] < made["mean"] < made["high"]
    (tmp_path / "d.jsonl").write_text('{"prompt": "the", "response": "cat"}\n')
    monkeypatch.setattr(answers, "_written", lambda *_: pytest.fail("it wrote"))
    assert "exact match" not in weft.evaluate(model, str(tmp_path / "d.jsonl"))
