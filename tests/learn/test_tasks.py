"""Training by task: each example trains the adapter of its task, as if the others were not there; and what cannot is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.error import ConflictError, FormatError, OptionError
from weft.learn.data import Response, Text, fingerprint
from weft.learn.leaks import refuse_leaks
from weft.learn.read import read
from weft.learn.train import History, train
from weft.learn.trainer import trainable
from weft.model import weave

from .test_train import PAIRS, TEXTS, Until, result, same

TASKS = [replace(e, task="ab"[i % 2]) for i, e in enumerate(TEXTS)]
METHODS = {"poly": {"rank": 2, "skills": 3, "heads": 2}, "mtlora": {"rank": 2, "own": 1}}


def many(tiny: Any, method: str = "poly", family: str = "llama", **given: Any) -> nn.Module:
    """A tiny model with adapters a and b, moved from their start."""
    model = weave(tiny(family))
    weft.apply(model, method, name="a,b", **METHODS[method] | given)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=rng), alpha=0.1)
    return model


def learnt(model: nn.Module, words: Any, data: Any = TASKS, **given: Any) -> History:
    how = {"steps": 6, "batch": 4, "length": 32, "save_every": 2, "by_task": True}
    return train(model, data, tokenizer=words, **how | given)


@pytest.mark.parametrize("how", [{}, {"checkpointing": True}, {"micro_batch": 1}])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_each_task_alone(method: str, how: dict[str, Any], tiny: Any, words: Any) -> None:
    """The gradient of a mixed batch is the sum of what each task's examples give with its adapter alone switched on."""
    model = many(tiny, method)
    want, count = {n: torch.zeros_like(p) for n, p in trainable(model).items()}, 0
    for task in "ab":
        mine = [e for e in TASKS if e.task == task]
        weft.activate(model, task)
        for e in mine:
            ids = torch.tensor([words(e.text, add_special_tokens=False)["input_ids"] + [0]])
            model.zero_grad()
            loss = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).sum().neg()
            loss.backward()
            count += ids.shape[1] - 1
            for p, total in zip(trainable(model).values(), want.values(), strict=True):
                total += p.grad if p.grad is not None else 0
    grads: list[dict[str, torch.Tensor]] = []

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            grads.append({n: p.grad.clone() for n, p in trainable(other).items()})

    other = many(tiny, method)
    options: dict[str, Any] = {"steps": 1, "batch": len(TASKS), "clip": 0.0, **how}
    learnt(other, words, optimizer=lambda params, lr: Keep(list(params.values()), lr), **options)
    for got, total in zip(grads[0].values(), want.values(), strict=True):
        torch.testing.assert_close(got, total / count, rtol=1e-4, atol=1e-6)
        assert bool(total.any())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_resumed_run_is_the_straight_run(family: str, tiny: Any, words: Any, tmp_path: Path) -> None:
    """To the bit, and no task is active afterwards; pairs too."""
    data = TASKS if family == "llama" else [replace(e, task="ab"[i % 2]) for i, e in enumerate(PAIRS)]
    straight, stopped, again = (many(tiny, family=family) for _ in range(3))
    learnt(straight, words, data, out=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        learnt(stopped, words, data, out=tmp_path / "b", progress=Until(5))
    learnt(again, words, data, out=tmp_path / "b")
    assert same(result(again), result(straight)) and not same(result(stopped), result(straight))
    assert {a.strength for m in (straight, stopped, again) for a in weft.adapters(m).values()} == {0.0}


def test_held_out_examples_are_scored_by_task(tiny: Any, words: Any) -> None:
    """The loss is the mean over targets, each example's with its own adapter."""
    model, held = many(tiny), [Text("a bird flew .", task="a"), Text("the cat ran over a hill .", task="b")]
    said = learnt(model, words, held_out=held, eval_every=2, lr=1e-12)
    total, count = 0.0, 0
    for e in held:
        weft.activate(model, e.task)
        ids = torch.tensor([words(e.text, add_special_tokens=False)["input_ids"] + [0]])
        with torch.no_grad():
            total -= float(model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert said.held_out[-1][1] == pytest.approx(total / count, rel=1e-5)


def test_what_has_no_task_or_adapter_is_refused(tiny: Any, words: Any) -> None:
    """Examples and tasks by their names; adapters that are on and that nothing trains; packed rows; branches."""
    with pytest.raises(FormatError, match="no task"):
        learnt(many(tiny), words, [*TASKS, Text("the cat ran .", "line 9")])
    with pytest.raises(OptionError, match="no such adapter"):
        learnt(many(tiny), words, [*TASKS, Text("the cat ran .", task="c")])
    with pytest.raises(OptionError, match="a row of a batch has one task"):
        learnt(many(tiny), words, pack=True)
    model = many(tiny)
    weft.apply(model, "lora", name="style")
    with pytest.raises(ConflictError, match="no example trains") as e:
        learnt(model, words)
    assert "style" in str(e.value.where)
    weft.activate(model, ["a", "b"])
    learnt(model, words, steps=1)
    weft.activate(model, ["a", "b"])
    weft.apply(model, "bottleneck", name="a")
    with pytest.raises(ConflictError, match="no branches"):
        learnt(model, words)


def test_without_by_task_the_field_changes_nothing(tiny: Any, words: Any) -> None:
    """Nor does it count as words that leak; but data with tasks is other data."""
    one, other = many(tiny), many(tiny)
    learnt(one, words, by_task=False)
    learnt(other, words, TEXTS, by_task=False)
    assert same(result(one), result(other))
    assert fingerprint(TASKS) != fingerprint(TEXTS) == fingerprint([replace(e, name="x") for e in TEXTS])
    with pytest.raises(ConflictError, match="held-out"):
        refuse_leaks(TASKS, [replace(TASKS[0], task="other")])


def test_records_may_have_a_task(tmp_path: Path) -> None:
    """Where it is text; anything else is a field like others."""
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "response": "b", "task": "x"}\n{"prompt": "a", "response": "b", "task": 3}\n'
    )
    assert [replace(e, name="") for e in read(tmp_path / "a.jsonl")] == [
        Response("a", "b", task="x"),
        Response("a", "b"),
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "task": "\\ud800"}')
    with pytest.raises(FormatError, match="not text"):
        read(tmp_path / "b.jsonl")
