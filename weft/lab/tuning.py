"""The tuned arms of a claim: adapters and branches trained for a few steps on another domain, at the best of a few rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from weft.engine import branches, get
from weft.engine.run import Chain, apply, chain_key
from weft.error import NumericError
from weft.lab import metrics, tasks
from weft.lab.trial import Arm, Trial, task_of
from weft.learn.data import Example, Pair, Text, fingerprint
from weft.learn.train import train
from weft.model import fork

RATES = (1e-3, 3e-3, 1e-2)
"""Learning rates that every arm chooses from, on the select set; for pairs a fifth of them."""
STEPS = 24
BATCH = 8
TOKENS = 128
"""Tokens of a training window."""
PAGE = 1024
"""Characters of a document that are trained and tested on."""
SNIPPET = 160
"""Characters of a pair's positive that are."""
CHOICE = 48
"""Examples that a learning rate is chosen by."""


def gained(trial: Trial, chain: Chain) -> Arm:
    """How much lower the test scores are after what this chain adds was trained on the tuning task."""
    before, task = untuned(trial), _task(trial)

    def make() -> metrics.Scores:
        runs = [_tuned(trial, task, chain, rate) for rate in _rates(trial)]
        best = int(np.argmin([score for score, _ in runs]))
        values, weights = _score(trial, runs[best][1], task.test)
        return before.values - values, weights

    return trial.arm("gain", [chain_key(chain), _rates(trial), *_recipe(task)], make, _metric(trial))


def untouched(trial: Trial) -> Arm:
    """The gain of doing nothing."""
    before = untuned(trial)
    return Arm(np.zeros_like(before.values), before.weights, before.seconds, before.metric)


def untuned(trial: Trial) -> Arm:
    """Test scores of the original."""
    task = _task(trial)
    return trial.arm("untuned", _recipe(task), lambda: _score(trial, trial.subject.model, task.test), _metric(trial))


def _metric(trial: Trial) -> tuple[str, str]:
    return ("gain in bits per query", "bits/query") if trial.subject.embeds else ("gain in bits per byte", "bits/byte")


def _task(trial: Trial) -> tasks.Task:
    """The tuning task, its examples cut short."""
    held = task_of(trial.subject.tuning_task, trial.seed)
    return dataclasses.replace(
        held, train=_short(held.train), select=_short(held.select[:CHOICE]), test=_short(held.test)
    )


def _rates(trial: Trial) -> list[float]:
    return [rate / 5 if trial.subject.embeds else rate for rate in RATES]


def _recipe(task: tasks.Task) -> list[Any]:
    """What a tuned arm depends on besides its adapter."""
    return [STEPS, BATCH, TOKENS, *(fingerprint(part) for part in (task.train, task.select, task.test))]


def _tuned(trial: Trial, task: tasks.Task, chain: Chain, rate: float) -> tuple[float, nn.Module]:
    """The select score after training at this rate (infinite if it diverged), and the model."""
    model, tokenizer = fork(trial.subject.model), trial.subject.tokenizer
    _add(model, chain, trial.seed)
    try:
        train(model, task.train, tokenizer=tokenizer, steps=STEPS, batch=BATCH, length=TOKENS, lr=rate, seed=trial.seed)
        values, weights = _score(trial, model.cpu(), task.select)
    except NumericError:
        return np.inf, model.cpu()
    mean = float((values * weights).sum() / weights.sum())
    return (mean if np.isfinite(mean) else np.inf), model


def _add(model: nn.Module, chain: Chain, seed: int) -> None:
    """Run a chain of rewrites, on every linear layer but the head, and of branches."""
    for added, steps in groupby(chain, lambda s: get(s.method).kind == "branch"):
        if added:
            for step in steps:
                branches.run(model, step, seed=seed)
        else:
            apply(model, tuple(steps), at="all-linear", seed=seed)


def _score(trial: Trial, model: nn.Module, examples: Sequence[Example]) -> metrics.Scores:
    if trial.subject.embeds:
        return metrics.bits_per_query(metrics.similarities(model, trial.subject.tokenizer, examples))
    return metrics.bits_per_byte(model, trial.subject.tokenizer, metrics.texts_of(examples), length=256)


def _short(examples: Sequence[Example]) -> list[Example]:
    return [_cut(e) for e in examples]


def _cut(e: Example) -> Example:
    if isinstance(e, Pair):
        return Pair(e.query, e.positive[:SNIPPET], e.name)
    return Text(e.text[:PAGE], e.name) if isinstance(e, Text) else e
