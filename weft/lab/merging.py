"""The merged arms of a claim: members tuned from the lab model on several tasks, or on one with several seeds, then merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from weft.engine import combine
from weft.engine.run import Step, chain_key
from weft.expr import Dense, unfrozen
from weft.lab import metrics, tasks
from weft.lab.trial import Arm, Trial, task_of
from weft.learn.data import Example, fingerprint
from weft.learn.train import train
from weft.model import expressions, fork, match, places, set_expressions
from weft.store.cache import key

TASKS: Mapping[str, tuple[str, ...]] = {"ref-lm": ("sorting", "dates", "arithmetic"), "minilm": ("naming",)}
"""What members of each lab model are tuned on; those that differ by their seed, on the first."""
Members = Literal["tasks", "seeds"]
COUNT = 3
"""Members that differ by their seed."""
STEPS = 40
BATCH = 8
TOKENS = 64
RATE = 5e-4
"""Peak learning rate; for pairs a tenth of it."""
TESTED = 100
"""Test examples of a task."""
CHOICE = 48
"""Examples that the best member is chosen by."""

Of = tuple[str, int]
"""A member: its task and its seed."""


def able(model: str, kind: Members, count: int | None) -> bool:
    """Whether a lab model has tasks for such members."""
    return len(TASKS.get(model, ())) >= (1 if kind == "seeds" else max(2, count or 2))


def members(trial: Trial, kind: Members, count: int | None) -> list[Of]:
    """The members of a trial: `count` of them, or 3 seeds, or all tasks."""
    known = TASKS[trial.subject.name]
    if kind == "seeds":
        size = count or COUNT
        return [(known[0], size * trial.seed + i) for i in range(size)]
    return [(name, trial.seed) for name in known[:count]]


def gained(step: Step, trial: Trial, of: Sequence[Of]) -> Arm:
    """How much lower the test scores of the members' tasks are after they were merged, tasks counting alike."""

    def make() -> metrics.Scores:
        made, _, _ = combine.run([member(trial, m) for m in of], step, base=trial.subject.model, seed=trial.seed)
        return _gain(trial, made, of)

    return trial.arm("merged", [chain_key((step,)), *_recipe(trial, of)], make, metric(trial))


def mean(trial: Trial, of: Sequence[Of]) -> Arm:
    """The mean over the members of what each gains on all of these tasks."""
    arms = [_alone(trial, m, of) for m in of]
    values = np.mean([a.values for a in arms], axis=0)
    return dataclasses.replace(arms[0], values=values, seconds=sum(a.seconds for a in arms))


def best(trial: Trial, of: Sequence[Of]) -> Arm:
    """What the member gains that scores best on the examples to choose by."""

    def make() -> metrics.Scores:
        chosen = [
            score(trial, member(trial, m), [e for name in _names(of) for e in short_task(trial, name).select])
            for m in of
        ]
        means = [float((values * weights).sum() / weights.sum()) for values, weights in chosen]
        return np.array(means), np.ones(len(means))

    scores = trial.arm("members chosen", _recipe(trial, of), make, metric(trial))
    return _alone(trial, of[int(np.argmin(scores.values))], of)


def member(trial: Trial, of: Of) -> nn.Module:
    """The lab model with all its linear layers tuned on a task, in float32; kept in the cache for all claims."""
    name, seed = of
    task, base = short_task(trial, name, seed), trial.subject.model
    sites = match(base, "all-linear")

    def make() -> dict[str, Tensor]:
        model = fork(base)
        set_expressions(model, {n: unfrozen(expressions(base)[n]) for n in sites})
        rate = RATE / 10 if trial.subject.embeds else RATE
        how: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "length": TOKENS, "lr": rate, "seed": seed}
        train(model, task.train, tokenizer=trial.subject.tokenizer, **how)
        return {n: expressions(model)[n].dense().detach().cpu().clone() for n in sites}

    about = [trial.subject.fingerprint, trial.code, STEPS, BATCH, TOKENS, RATE, seed, fingerprint(task.train)]
    held = trial.store.tensors("lab-members", key(*about), make)
    model = fork(base)
    set_expressions(model, {n: Dense(held[n]) for n in sites})
    for n in sites:
        places(model)[n].dtype = torch.float32
    return model


def _alone(trial: Trial, one: Of, of: Sequence[Of]) -> Arm:
    """What one member gains on the tasks of all."""
    return trial.arm("member", [one, *_recipe(trial, of)], lambda: _gain(trial, member(trial, one), of), metric(trial))


def _gain(trial: Trial, model: nn.Module, of: Sequence[Of]) -> metrics.Scores:
    before, (values, weights) = _untuned(trial, of), _tested(trial, model, of)
    return before.values - values, weights


def _untuned(trial: Trial, of: Sequence[Of]) -> Arm:
    """Test scores of the original on the members' tasks."""
    return trial.arm("untuned", _tests(trial, of), lambda: _tested(trial, trial.subject.model, of), metric(trial))


def nothing(trial: Trial, of: Sequence[Of]) -> Arm:
    """The gain of doing nothing."""
    before = _untuned(trial, of)
    return Arm(np.zeros_like(before.values), before.weights, before.seconds, before.metric)


def _tested(trial: Trial, model: nn.Module, of: Sequence[Of]) -> metrics.Scores:
    """Scores on the tests of all tasks, one after another, whose weights sum to one each."""
    made = [score(trial, model, short_task(trial, name).test) for name in _names(of)]
    return np.concatenate([v for v, _ in made]), np.concatenate([w / w.sum() for _, w in made])


def score(trial: Trial, model: nn.Module, examples: Sequence[Example]) -> metrics.Scores:
    if trial.subject.embeds:
        return metrics.bits_per_query(metrics.similarities(model, trial.subject.tokenizer, examples))
    return metrics.response_bits(model, trial.subject.tokenizer, examples, batch=32)


def metric(trial: Trial) -> tuple[str, str]:
    return (
        ("gain in bits per query", "bits/query")
        if trial.subject.embeds
        else ("gain in bits per byte of answers", "bits/byte")
    )


def _names(of: Sequence[Of]) -> list[str]:
    return list(dict.fromkeys(name for name, _ in of))


def short_task(trial: Trial, name: str, seed: int = 0) -> tasks.Task:
    """A task, its sets cut short."""
    held = task_of(name, seed, pairs=trial.subject.embeds)
    return dataclasses.replace(held, select=held.select[:CHOICE], test=held.test[:TESTED])


def _tests(trial: Trial, of: Sequence[Of]) -> list[Any]:
    return [fingerprint(short_task(trial, name).test) for name in _names(of)]


def _recipe(trial: Trial, of: Sequence[Of]) -> list[Any]:
    """What a merged arm depends on besides its method."""
    trained = [[seed, fingerprint(short_task(trial, name, seed).train)] for name, seed in of]
    return [STEPS, BATCH, TOKENS, RATE, CHOICE, trained, _tests(trial, of)]
