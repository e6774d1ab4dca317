"""The arms of a claim on repair: a compressed model, tuned for a few steps on texts like those that distances are measured on."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from weft.engine.run import Chain, chain_key
from weft.error import NumericError
from weft.lab import metrics
from weft.lab.distance import Distance, padded, windows
from weft.lab.trial import Arm, Trial, task_of, texts
from weft.lab.tuning import lowest, prepared
from weft.learn.data import fingerprint
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import fork, harden
from weft.store.cache import key

RATES = (2.5e-5, 1e-4, 4e-4, 1.6e-3, 6.4e-3)
"""Learning rates that every arm chooses from."""
STEPS, BATCH, TOKENS = 16, 4, 128
CHOICE = 2048
"""Tokens that a rate is chosen by."""


def restored(trial: Trial, *, chain: Chain) -> Arm:
    """Distances to the original after this chain, and after training what it made trainable, if anything."""

    rate = _rate(trial, chain)

    def make() -> metrics.Scores:
        return trial.distance.documents(_tuned(trial, chain, rate))

    what = [trial.data, chain_key(chain), rate, *_recipe(trial)]
    return trial.arm("restored", what, make, (trial.goal.name, trial.goal.unit))


def _rate(trial: Trial, chain: Chain) -> float:
    """The rate at which the first seed ends nearest to the original on the select set."""
    cut = padded if trial.subject.embeds else windows
    held = texts(task_of(trial.subject.distance_task, 0).select)
    batches = cut(held, trial.subject.tokenizer, length=TOKENS, tokens=CHOICE)
    about = ["restored", *_recipe(trial.first)]
    name = key(trial.subject.fingerprint, trial.code, *about)

    def search(first: Trial) -> float:
        prepared(first, model := fork(first.subject.model), chain)
        if not trainable(model):
            return RATES[0]
        near = Distance(trial.subject.model, batches, trial.goal, trial.store, name)

        def score(rate: float) -> float:
            try:
                return near(_tuned(first, chain, rate))
            except NumericError:
                return np.inf

        return lowest(RATES, score)

    return trial.rate(chain, about, search)


def _tuned(trial: Trial, chain: Chain, rate: float) -> nn.Module:
    """The lab model after the chain and its training at this rate."""
    model = fork(trial.subject.model)
    moves = prepared(trial, model, chain)
    if trainable(model):
        how: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "length": TOKENS, "lr": rate, "seed": trial.seed}
        data = task_of(trial.subject.distance_task, trial.seed).train[: STEPS * BATCH]
        train(model, data, tokenizer=trial.subject.tokenizer, **how, **moves)
    harden(model)
    return model.cpu()


def _recipe(trial: Trial) -> list[Any]:
    """What an arm depends on besides its chain."""
    task = task_of(trial.subject.distance_task, trial.seed)
    return [RATES, STEPS, BATCH, TOKENS, CHOICE, fingerprint(task.train[: STEPS * BATCH]), fingerprint(task.select)]
