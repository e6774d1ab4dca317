"""The arms of a claim on what a context generates: texts of several segments, of which a model reads one at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.engine import branches, get
from weft.engine.run import Chain, apply, chain_key
from weft.error import NumericError
from weft.lab import metrics
from weft.lab.trial import Arm, Trial, task_of, texts
from weft.learn.data import Example, Text
from weft.learn.train import train
from weft.model import branches as held
from weft.model import fork
from weft.stats import forward

SEGMENT, SEGMENTS = 64, 4
"""Tokens that a model reads at once, and how many times as many a text has."""
STEPS, BATCH = 40, 4
"""Steps, and texts a step."""
RATES = (1e-3, 4e-3)
"""Learning rates that each arm chooses from."""
CHOICE, TESTED = 16, 64
"""Texts that a rate is chosen by, and that are tested on."""
METRIC = ("gain in bits per byte behind the first segment", "bits/byte")


def recalled(trial: Trial, chain: Chain) -> Arm:
    """How much likelier tokens behind the first segment are after what the chain made trainable was trained.

    What has a branch is given whole texts, which that cuts; for all else each segment is a text of its own.
    """
    rate = _rate(trial, chain)

    def make() -> metrics.Scores:
        model = _taught(trial, chain, rate)
        values, weights = _behind(trial, model, _rows(trial, "test", TESTED))
        return _before(trial).values - values, weights

    return trial.arm("recall", [chain_key(chain), rate, *_recipe(trial)], make, METRIC)


def forgotten(trial: Trial) -> Arm:
    """The gain of doing nothing."""
    before = _before(trial)
    return dataclasses.replace(before, values=np.zeros_like(before.values))


def _before(trial: Trial) -> Arm:
    """Bits a byte of the model as it is, a segment at a time."""
    tested = _rows(trial, "test", TESTED)
    return trial.arm("recall", _recipe(trial), lambda: _behind(trial, trial.subject.model, tested), METRIC)


def _rate(trial: Trial, chain: Chain) -> float:
    """The rate at which the first seed scores best on the texts to choose by."""

    def search(first: Trial) -> float:
        def score(rate: float) -> float:
            try:
                values, weights = _behind(first, _taught(first, chain, rate), _rows(first, "select", CHOICE))
            except NumericError:
                return math.inf
            return float((values * weights).sum() / weights.sum())

        return min(RATES, key=score)

    return trial.rate(chain, ["recalled", CHOICE, *_recipe(trial.first)], search)


def _taught(trial: Trial, chain: Chain, rate: float) -> nn.Module:
    """The model after training on as many tokens a step, in whole texts or in segments. Errors: NumericError if it diverged."""
    model = fork(trial.subject.model)
    for step in chain:
        if get(step.method).kind == "branch":
            branches.run(model, step, seed=trial.seed)
        else:
            apply(model, (step,), at="all-linear", seed=trial.seed)
    times = 1 if held(model) else SEGMENTS
    rows = _rows(trial, "train", STEPS * BATCH).view(-1, SEGMENT * SEGMENTS // times)
    learnt: Sequence[Example] = [Text(trial.subject.tokenizer.decode(r)) for r in rows]
    how: dict[str, Any] = {"steps": STEPS, "batch": BATCH * times, "length": rows.shape[1], "lr": rate}
    train(model, learnt, tokenizer=trial.subject.tokenizer, seed=trial.seed, **how)
    return model.cpu()


def _behind(trial: Trial, model: nn.Module, rows: Int[Tensor, "k t"]) -> metrics.Scores:
    """Bits a byte of every text's tokens behind its first segment, and their bytes."""
    made: list[Float[Tensor, " k"]] = []
    for part in rows.split(8):
        asked = part if held(model) else part.view(-1, SEGMENT)
        with torch.no_grad():
            logits = forward(model, {"input_ids": asked}).reshape(*part.shape, -1)[:, SEGMENT:-1]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), part[:, SEGMENT + 1 :].flatten(), reduction="none")
        made.append(nats.view(len(part), -1).double().sum(1) / math.log(2))
    said = [trial.subject.tokenizer.decode(r[SEGMENT + 1 :]) for r in rows]
    size = np.array([max(1, len(t.encode())) for t in said], dtype=np.float64)
    return torch.cat(made).numpy() / size, size


def _rows(trial: Trial, part: str, count: int) -> Int[Tensor, "k t"]:
    """The first whole texts of the tuning task: pieces of its documents."""
    length, found = SEGMENT * SEGMENTS, list[Tensor]()
    for text in texts(getattr(task_of(trial.subject.tuning_task, trial.seed), part)):
        ids = torch.tensor(trial.subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        found += list(ids[: len(ids) // length * length].view(-1, length)) if len(ids) >= length else []
        if len(found) >= count:
            break
    return torch.stack(found[:count]).long()


def _recipe(trial: Trial) -> list[Any]:
    """What an arm depends on besides its chain."""
    rows = [_rows(trial, "train", STEPS * BATCH), _rows(trial, "test", TESTED)]
    return [SEGMENT, SEGMENTS, STEPS, BATCH, RATES, *(r.tolist() for r in rows)]
