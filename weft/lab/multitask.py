"""The arms of a claim on several tasks at once: adapters by task, or one for all, trained on a mixture; and then on a new task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from weft.engine.run import Chain, chain_key
from weft.error import NumericError
from weft.lab import merging, metrics
from weft.lab.trial import Arm, Trial
from weft.lab.tuning import lowest, prepared
from weft.learn.data import Example, fingerprint
from weft.learn.train import train
from weft.model import activate, adapters, fork

TASKS = ("sorting", "dates", "arithmetic")
"""What is trained at once."""
NEW = "edits"
"""A task that comes later, with few examples."""
STEPS, FEW_STEPS = 24, 12
BATCH, TOKENS = 12, 48
FEW = 32
"""Examples of the new task."""
RATES = (1e-3, 4e-3, 1.6e-2)
CHOICE = 16
"""Examples of a task that a learning rate is chosen by."""
MODEL = "ref-lm"
"""The lab model that has several tasks."""


def gained(trial: Trial, chain: Chain, before: Chain) -> Arm:
    """How much lower the test scores are after training what this chain adds: on all tasks, or, `before` having been, on the new one.

    Tasks count alike.
    """
    names, rate = (NEW,) if before else TASKS, _rate(trial, chain, before)

    def make() -> metrics.Scores:
        values, weights = _tested(trial, _tuned(trial, chain, before, rate), names)
        return _untuned(trial, names).values - values, weights

    what = [chain_key(chain), chain_key(before), rate, *_recipe(trial)]
    return trial.arm("multitask", what, make, merging.metric(trial))


def nothing(trial: Trial, *, new: bool) -> Arm:
    """The gain of doing nothing."""
    before = _untuned(trial, (NEW,) if new else TASKS)
    return replace(before, values=np.zeros_like(before.values))


def _untuned(trial: Trial, names: Sequence[str]) -> Arm:
    what = [names, *_recipe(trial)]
    return trial.arm("untuned tasks", what, lambda: _tested(trial, trial.subject.model, names), merging.metric(trial))


def _tested(trial: Trial, model: nn.Module, names: Sequence[str]) -> metrics.Scores:
    """Scores on the tests of these tasks, each with its adapter where it has one; the weights of a task sum to one."""
    made = [_score(trial, model, name, merging.short_task(trial, name).test) for name in names]
    return np.concatenate([v for v, _ in made]), np.concatenate([w / w.sum() for _, w in made])


def _score(trial: Trial, model: nn.Module, name: str, examples: Sequence[Example]) -> metrics.Scores:
    if name in adapters(model):
        activate(model, name)
    return merging.score(trial, model, examples)


def _rate(trial: Trial, chain: Chain, before: Chain) -> float:
    """The rate at which the first seed scores best on examples to choose by."""
    names = (NEW,) if before else TASKS
    if before:
        _rate(trial, before, ())  # which `_tuned` asks for, and the proof is to say

    def search(first: Trial) -> float:
        def score(lr: float) -> float:
            try:
                model = _tuned(first, chain, before, lr)
                made = [_score(first, model, n, merging.short_task(first, n).select[:CHOICE]) for n in names]
            except NumericError:
                return np.inf
            return float(np.mean([(values * weights).sum() / weights.sum() for values, weights in made]))

        return lowest(RATES, score)

    return trial.rate(chain, ["tasks", chain_key(before), RATES, CHOICE, *_recipe(trial.first)], search)


def _tuned(trial: Trial, chain: Chain, before: Chain, rate: float) -> nn.Module:
    """The lab model after training at this rate; where it is the new task's, what was `before` was trained at its own."""
    if not before:
        model = fork(trial.subject.model)
        return _train(trial, model, chain, [e for name in TASKS for e in _examples(trial, name)], rate, STEPS)
    model = _tuned(trial, before, (), _rate(trial, before, ()))
    model.requires_grad_(False)
    activate(model, [])
    return _train(trial, model, chain, _examples(trial, NEW)[:FEW], rate, FEW_STEPS)


def _train(trial: Trial, model: nn.Module, chain: Chain, data: Sequence[Example], rate: float, steps: int) -> nn.Module:
    """Add what a chain adds, and train it; by task where tasks have adapters."""
    moves = prepared(trial, model, chain)
    how: dict[str, Any] = {"steps": steps, "batch": BATCH, "length": TOKENS, "lr": rate, "seed": trial.seed}
    by_task = {e.task for e in data} <= adapters(model).keys()
    train(model, data, tokenizer=trial.subject.tokenizer, by_task=by_task, **moves, **how)
    return model.cpu()


def _examples(trial: Trial, name: str) -> list[Example]:
    """What there is to train on of a task; as much of each."""
    held = merging.short_task(trial, name, trial.seed).train
    return [replace(e, task=name) for e in held[: STEPS * BATCH]]


def _recipe(trial: Trial) -> list[Any]:
    """What an arm depends on besides its chains."""
    data = [merging.short_task(trial, name, trial.seed) for name in (*TASKS, NEW)]
    sets = [fingerprint(part) for t in data for part in (t.train, t.select, t.test)]
    return [TASKS, NEW, STEPS, FEW_STEPS, BATCH, TOKENS, FEW, *sets]
