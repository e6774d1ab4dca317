"""What a run may be told: every option is used or refused, and those that only save time or memory change no result."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.engine.run import Step, apply
from weft.error import ConflictError, FormatError, OptionError, WeftError
from weft.learn.batches import Collate, order, packed
from weft.learn.data import IGNORE, Encoded, Pair, Response, Text, encode
from weft.learn.settings import Training
from weft.learn.train import History, train
from weft.model import weave

from .test_train import PAIRS, TEXTS, THINGS, Until, adapted, result, same

LONG = [Response(f"the {a} sat on the mat under the tree . " * n, "yes .") for n in (1, 3) for a in THINGS]
HELD = [Text(f"the old {a} ran over the hill .") for a in THINGS]


def packed_rows(words: Any) -> list[Any]:
    """The rows that LONG is packed into."""
    return packed(encode(LONG, words, length=64), 64)


class Told:
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        yield lambda n, note="": self.notes.append(note)


def learnt(tiny: Any, words: Any, data: Any = TEXTS, family: str = "llama", **options: Any) -> tuple[Any, History]:
    """A tiny model after four steps, and what training said."""
    model = adapted(tiny, family)
    given = {"steps": 4, "batch": 4, "length": 32, "lr": 1e-2, **options}
    return model, train(model, data, tokenizer=words, **given)


@pytest.mark.parametrize("changed", [{"micro_batch": 1}, {"micro_batch": 2}])
@pytest.mark.parametrize("data", [LONG, TEXTS])
def test_micro_batches_change_nothing(data: Any, changed: dict[str, Any], tiny: Any, words: Any) -> None:
    """The loss is the mean over a step's targets, not the mean of means."""
    (whole, said), (_, theirs) = learnt(tiny, words, data), learnt(tiny, words, data, **changed)
    assert not same(result(adapted(tiny)), result(whole))
    assert np.allclose([x for _, x in said.losses], [x for _, x in theirs.losses], rtol=1e-4)


def test_packed_rows_have_the_same_loss(tiny: Any, words: Any) -> None:
    """All examples in one step, packed or not: one loss, one gradient."""
    _, said = learnt(tiny, words, LONG, batch=99, length=64)
    _, theirs = learnt(tiny, words, LONG, batch=99, pack=True, length=64)
    assert np.allclose([x for _, x in said.losses], [x for _, x in theirs.losses], rtol=1e-4)
    assert said.tokens == theirs.tokens and len(packed_rows(words)) < len(LONG)


def test_rows_hold_every_example_once_and_are_full() -> None:
    """No more rows than half-full ones would be, none too long, positions from 0 in each example, no target across examples."""
    rng = np.random.default_rng(0)
    made = [Encoded([i] * n, [i] * n) for i, n in enumerate(rng.integers(2, 60, 200).tolist())]
    rows = packed(made, 64)
    assert sorted(e.input_ids[0] for r in rows for e in r) == list(range(200))
    assert all(sum(len(e.input_ids) for e in r) <= 64 for r in rows)
    assert len(rows) <= 1.1 * sum(len(e.input_ids) for e in made) / 64 + 1
    batch = Collate(type("T", (), {"pad_token_id": None}), 64, pack=True)(rows[:3])
    for ids, at, labels, row in zip(batch["input_ids"], batch["position_ids"], batch["labels"], rows, strict=False):
        begins = [i for i, p in enumerate(at.tolist()) if p == 0]
        want = np.cumsum([0, *(len(e.input_ids) for e in row)]).tolist()
        assert begins == [b for b in want if b < 64] and len(ids) == 64
        assert all(int(labels[b]) == IGNORE for b in begins)
        assert all(i == j for i, j in zip(ids.tolist(), labels.tolist(), strict=True) if j != IGNORE)


def test_a_model_that_mixes_packed_examples_is_refused(tiny: Any, words: Any) -> None:
    """Here one whose positions are ignored, so that the mask never comes about; and pairs, which have no rows."""
    model = adapted(tiny)
    inner = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ConflictError, match="apart"):
        train(model, LONG, tokenizer=words, steps=1, pack=True, length=64)
    with pytest.raises(OptionError, match="pack"):
        train(adapted(tiny, "bert"), PAIRS, tokenizer=words, steps=1, pack=True)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_held_out_data_is_of_the_same_kind(family: str, tiny: Any, words: Any) -> None:
    """A pair has no labels, and a text no other half."""
    kinds = [[Text("the cat sat .")] * 2, [Pair("a dog", "ran")] * 2]
    data, held = kinds if family == "llama" else kinds[::-1]
    with pytest.raises(FormatError, match="one kind"):
        train(adapted(tiny, family), data, held_out=held, tokenizer=words, steps=1)


def test_order_is_a_shuffle_again_and_again() -> None:
    """Every epoch holds every item once; another seed, another order; buckets hold the same items, of like lengths."""
    drawn = order(10, 6, 5, seed=0)
    assert [sorted(drawn[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn.tolist() != order(10, 6, 5, seed=1).tolist() and drawn.tolist() == order(10, 6, 5, seed=0).tolist()
    long = np.random.default_rng(0).integers(1, 100, 640)
    plain, sorted_ = order(640, 64, 10, 3), order(640, 64, 10, 3, long.tolist())
    assert sorted(sorted_.tolist()) == sorted(plain.tolist()) == list(range(640))
    spread = [float(np.ptp(long[o.reshape(-1, 10)], axis=1).mean()) for o in (plain, sorted_)]
    assert spread[1] < 0.1 * spread[0]
    firsts = long[sorted_.reshape(-1, 10)].mean(1)
    assert abs(float(np.corrcoef(firsts, np.arange(64))[0, 1])) < 0.5


def test_epochs_count_examples(tiny: Any, words: Any) -> None:
    """Two epochs of nine examples by four: five steps. Steps and epochs together are refused."""
    assert len(learnt(tiny, words, steps=None, epochs=2)[1].losses) == 5
    with pytest.raises(OptionError, match="epochs"):
        learnt(tiny, words, epochs=2)


def test_bfloat16_products_train_too(tiny: Any, words: Any) -> None:
    """Near the float32 run, with other bits; afterwards the model computes as before, and trained tensors are float32."""
    (full, a), (half, b) = learnt(tiny, words), learnt(tiny, words, precision="bf16")
    assert not same(result(full), result(half)) and abs(a.losses[-1][1] - b.losses[-1][1]) < 0.1
    assert all(t.dtype == torch.float32 for t in result(half).values())
    assert half(torch.tensor([[2, 3]])).logits.dtype == torch.float32 and "forward" not in half.__dict__


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_end_where_they_say(kind: str, tiny: Any, words: Any) -> None:
    """A rate of zero moves nothing: linear's last step; weight decay and clipping do something."""
    runs = [result(learnt(tiny, words, schedule=kind, warmup=0.0, **more)[0]) for more in ({}, {"lr": 2e-2})]
    assert not same(*runs)
    assert not same(runs[0], result(learnt(tiny, words, schedule=kind, warmup=0.5)[0]))
    if kind == "constant":
        for changed in ({"weight_decay": 0.5}, {"clip": 1e-3}):
            assert not same(runs[0], result(learnt(tiny, words, schedule=kind, warmup=0.0, **changed)[0]))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_trains(kind: str, tiny: Any, words: Any) -> None:
    """A warm-up begins at a rate of 0; in as few steps there is none."""
    assert not same(result(adapted(tiny)), result(learnt(tiny, words, steps=1, schedule=kind)[0]))


def test_the_best_of_held_out_scores_stays(tiny: Any, words: Any) -> None:
    """At a rate that spoils the model, the step that scored best is where it ends; scores are those of the model then."""
    model = adapted(tiny)
    said = train(
        model, TEXTS, tokenizer=words, held_out=HELD, steps=12, batch=4, lr=0.3, save_every=2, schedule="constant"
    )
    scores = dict(said.held_out)
    assert sorted(scores) == [2, 4, 6, 8, 10, 12] and said.best == min(scores, key=lambda s: scores[s]) != 12
    again = train(model, HELD, tokenizer=words, steps=1, batch=9, lr=1e-9)
    assert again.losses[0][1] == pytest.approx(scores[said.best], rel=1e-4)


def test_the_best_score_stays_between_checkpoints(tiny: Any, words: Any) -> None:
    """Scored more often than saved, the best step is kept all the same."""
    _, said = learnt(tiny, words, held_out=HELD, steps=8, lr=0.3, save_every=4, eval_every=1, schedule="constant")
    assert len(said.held_out) == 8 and said.best == min(said.held_out, key=lambda s: s[1])[0]
    assert said.best is not None and said.best % 4
    _, said = learnt(tiny, words, held_out=HELD, steps=6, lr=0.3, eval_every=1, schedule="constant")
    assert said.best == min(said.held_out, key=lambda s: s[1])[0]


def test_held_out_pairs_are_scored(tiny: Any, words: Any) -> None:
    """A BERT is scored on held-out pairs."""
    held = [Pair(f"question {a} mat ?", f"the mat {a} flew .") for a in THINGS]
    _, said = learnt(tiny, words, PAIRS, "bert", held_out=held)
    assert len(said.held_out) == 1 and said.best == 4


def test_a_resumed_run_with_scores_is_the_straight_run(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Scoring takes nothing from the randomness of training, and the best checkpoint outlives a stop."""
    options: dict[str, Any] = {
        "tokenizer": words,
        "steps": 6,
        "batch": 2,
        "save_every": 2,
        "held_out": HELD,
        "lr": 2e-2,
    }
    straight, stopped, again, bare = (adapted(tiny) for _ in range(4))
    said = train(straight, TEXTS, out=tmp_path / "a", **options)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, TEXTS, out=tmp_path / "b", progress=Until(5), **options)
    resumed = train(again, TEXTS, out=tmp_path / "b", **options)
    assert same(result(straight), result(again)) and said.held_out == resumed.held_out and said.losses == resumed.losses
    assert said.tokens == resumed.tokens
    del options["held_out"]
    assert train(bare, TEXTS, **options).losses == said.losses


def test_held_out_data_that_is_trained_on_is_refused(tiny: Any, words: Any) -> None:
    """The same text in other spaces; a long text with a few words changed. A shared instruction is no leak."""
    long = " ".join(f"word{i}" for i in range(100))
    for train_on, held in (
        (Text("the  Cat sat ."), Text("The cat sat.")),
        (Text(long), Text(long.replace("word50", "other"))),
    ):
        with pytest.raises(ConflictError, match="1 of 1"):
            train(adapted(tiny), [train_on], tokenizer=words, held_out=[held], steps=1)
    told = " ".join(f"rule{i}" for i in range(60))
    data, held = ([Response(f"{told} question {i} ?", "yes .") for i in range(*r)] for r in ((0, 40), (40, 44)))
    train(adapted(tiny), data, tokenizer=words, held_out=held, steps=1)


def test_the_bar_says_how_fast_and_how_much(tiny: Any, words: Any) -> None:
    """Tokens a second and gigabytes beside every step; the result counts them too."""
    told = Told()
    _, said = learnt(tiny, words, progress=told)
    assert len(told.notes) == 4 and all(re.fullmatch(r"[\d,]+ tokens/s, \d+\.\d\d GB", n) for n in told.notes)
    assert said.peak_bytes > 1e8


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"batch": 0}, {"length": 1}, {"lr": 0.0}, {"lr": float("nan")}, {"schedule": "x"}, {"warmup": 2.0}, {"clip": -1.0},
        {"precision": "fp16"}, {"seed": -1}, {"nothing": 1}, {"micro_batch": 3}, {"eval_every": 3}, {"loggers": ("nowhere",)},
        {"loggers": ("tensorboard",)}, {"weight_decay": -1.0}, {"epochs": 0.0, "steps": None},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(bad: dict[str, Any], tiny: Any, words: Any) -> None:
    """An OptionError that names the option, before anything runs."""
    with pytest.raises(OptionError) as e:
        learnt(tiny, words, **bad)
    assert any(name in str(e.value) for name in bad)


def test_all_bad_options_are_told_at_once() -> None:
    """Three problems, one error."""
    with pytest.raises(WeftError) as e:
        Training.of(steps=0, lr=-1.0, nothing=2)
    assert all(word in str(e.value) for word in ("steps", "lr", "nothing"))


def test_tensorboard_writes_where_the_run_is(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Losses, epochs and rates."""
    learnt(tiny, words, loggers=["tensorboard"], out=tmp_path)
    assert list(tmp_path.rglob("events.out*"))


def test_checkpointing_needs_a_model_that_can(words: Any) -> None:
    """And leaves no hook behind on one that does."""
    model = weave(torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)))
    apply(model, [Step.of("lora", rank=1)], at="*")
    with pytest.raises(ConflictError, match="computed again"):
        train(model, [Pair("a", "cat")], tokenizer=words, steps=1, checkpointing=True)


@pytest.mark.parametrize("held", [None, HELD])
def test_a_run_that_was_over_is_not_trained_on(held: Any, tiny: Any, words: Any, tmp_path: Path) -> None:
    """Called again, it ends with the same bits and says the same; fewer steps than are kept are refused."""
    options: dict[str, Any] = {
        "tokenizer": words,
        "batch": 2,
        "save_every": 2,
        "out": tmp_path,
        "lr": 0.2,
        "held_out": held,
    }
    once, again = adapted(tiny), adapted(tiny)
    said, theirs = (train(m, TEXTS, steps=5, **options) for m in (once, again))
    assert same(result(once), result(again)) and said.losses == theirs.losses and said.held_out == theirs.held_out
    assert said.best == theirs.best and said.tokens == theirs.tokens
    with pytest.raises(ConflictError, match="longer"):
        train(adapted(tiny), TEXTS, steps=3, **options)
