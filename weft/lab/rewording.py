"""The arms of a claim on prompts in other words: a model that learnt one wording, adapted with some others, on yet others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.engine.run import Chain, Step, chain_key
from weft.error import NumericError
from weft.lab import merging, metrics
from weft.lab.trial import Arm, Trial
from weft.lab.tuning import lowest, prepared
from weft.learn.data import Example, Response, fingerprint
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import fork
from weft.store.cache import key

TASK = "wordings"
LEARNT, STEPS = 80, 16
"""Steps of all weights on prompts in reference words, and of what a chain adds on others."""
BATCH, TOKENS = 16, 48
RATE, RATES = 1e-3, (4e-3, 1.6e-2, 6.4e-2)
"""Of the first, and those that the second choose from."""


def gained(trial: Trial, chain: Chain) -> Arm:
    """How much lower the score on unseen wordings is after training what this chain adds, than after learning the references alone."""
    rate = _rate(trial, chain)

    def make() -> metrics.Scores:
        values, weights = _tested(trial, _adapted(trial, chain, rate), "test")
        return nothing(trial, gain=False).values - values, weights

    return trial.arm("reworded", [chain_key(chain), rate, *_recipe(trial)], make, merging.metric(trial))


def nothing(trial: Trial, *, gain: bool = True) -> Arm:
    """The gain of adding nothing, or the score."""
    before = trial.arm(
        "unworded", _recipe(trial), lambda: _tested(trial, _learnt(trial), "test"), merging.metric(trial)
    )
    return replace(before, values=np.zeros_like(before.values)) if gain else before


def _tested(trial: Trial, model: nn.Module, part: str) -> metrics.Scores:
    return merging.score(trial, model, getattr(merging.short_task(trial, TASK), part))


def _rate(trial: Trial, chain: Chain) -> float:
    """The rate at which the first seed scores best on the wordings to choose by."""

    def search(first: Trial) -> float:
        def score(rate: float) -> float:
            try:
                values, weights = _tested(first, _adapted(first, chain, rate), "select")
            except NumericError:
                return np.inf
            return float((values * weights).sum() / weights.sum())

        return lowest(RATES, score)

    return trial.rate(chain, ["reworded", *_recipe(trial.first)], search)


def _adapted(trial: Trial, chain: Chain, rate: float) -> nn.Module:
    """The model that learnt the references, after training what this chain adds on other wordings; its teacher is itself without."""
    model = _learnt(trial)
    before = fork(model)
    moves = prepared(trial, model, chain)
    if moves["objective"] is not None:
        moves["objective"] = replace(moves["objective"], teacher=before)
    return _train(trial, model, _examples(trial, STEPS), STEPS, rate, **moves)


def _learnt(trial: Trial) -> nn.Module:
    """The lab model with all its parameters tuned on prompts in reference words; frozen."""
    model = fork(trial.subject.model)
    moves = prepared(trial, model, (Step.of("full"),))

    def make() -> dict[str, Tensor]:
        said: list[Example] = [
            replace(e, prompt=e.reference, reference="") for e in _examples(trial, LEARNT) if isinstance(e, Response)
        ]
        learnt = trainable(_train(trial, fork(model), said, LEARNT, RATE, **moves))
        return {n: p.detach().clone() for n, p in learnt.items()}

    held = trial.store.tensors("lab-worded", key(trial.subject.fingerprint, trial.code, *_recipe(trial)), make)
    with torch.no_grad():
        for name, p in trainable(model).items():
            p.copy_(held[name])
    return model.requires_grad_(False)


def _train(trial: Trial, model: nn.Module, data: Sequence[Example], steps: int, rate: float, **moves: Any) -> nn.Module:
    how: dict[str, Any] = {"steps": steps, "batch": BATCH, "length": TOKENS, "lr": rate, "seed": trial.seed}
    train(model, data, tokenizer=trial.subject.tokenizer, **how, **moves)
    return model.cpu()


def _examples(trial: Trial, steps: int) -> list[Example]:
    """Examples for so many steps."""
    return merging.short_task(trial, TASK, trial.seed).train[: steps * BATCH]


def _recipe(trial: Trial) -> list[Any]:
    """What an arm depends on besides its chain."""
    task = merging.short_task(trial, TASK, trial.seed)
    return [LEARNT, STEPS, BATCH, TOKENS, RATE, RATES, *map(fingerprint, (task.train, task.select, task.test))]
