"""The tuned arms of a claim: what a chain makes trainable, trained for a few steps on another domain, at the best of some rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from weft.engine import branches, get, objectives, optimizers, outline, schedules
from weft.engine.run import Chain, Step, apply, chain_key
from weft.error import NumericError
from weft.lab import metrics, tasks
from weft.lab.distance import windows
from weft.lab.trial import Arm, Trial, task_of, texts
from weft.learn.data import Example, Pair, Text, fingerprint
from weft.learn.train import train
from weft.model import fork, mode

RATES = (2.5e-5, 1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2)
"""Learning rates that every arm chooses from, from the middle outward: from what all weights bear to what a few vectors need."""
STEPS = 8
BATCH, PAIRS = 4, 8
"""Examples a step; of pairs, which are told apart from each other, more."""
TOKENS, WORDS = 128, 32
"""Tokens of a training window, and of either text of a pair."""
READ = 1024
"""Tokens of the training texts that a branch which begins as text may read."""
PAGE = 512
"""Characters of a document that are trained and tested on."""
SNIPPET = 96
"""Characters of a pair's positive that are."""
CHOICE, PAIRS_CHOICE = 12, 60
"""Examples that a learning rate is chosen by; of pairs, whose scores vary more, more."""
TESTED, PAIRS_TESTED = 40, 96
"""Examples that are tested on, at most."""


def gained(trial: Trial, chain: Chain) -> Arm:
    """How much lower the test scores are after what this chain made trainable was trained on the tuning task."""
    before, task, best = untuned(trial), _task(trial), dict[int, nn.Module]()
    lr = rate(trial, chain, best)

    def make() -> metrics.Scores:
        model = best[trial.seed] if trial.seed in best else tuned(trial, chain, lr)
        values, weights = _score(trial, model, task.test)
        return before.values - values, weights

    return trial.arm("gain", [chain_key(chain), lr, *recipe(trial)], make, _metric(trial))


def rate(trial: Trial, chain: Chain, best: dict[int, nn.Module] | None = None) -> float:
    """The rate at which the first seed scores best on the select set; every seed is trained at it.

    Where it is found now, the first seed's model goes into `best`, which need not be trained again.
    """
    kept, least = dict[int, nn.Module]() if best is None else best, [np.inf]

    def search(first: Trial) -> float:
        def score(lr: float) -> float:
            found, model = tried(first, chain, lr)
            if found < least[0]:
                least[0], kept[0] = found, model
            return found

        return lowest(RATES, score)

    return trial.rate(chain, ["tuned", RATES, *_learnt(trial.first)], search)


def lowest(among: Sequence[float], score: Callable[[float], float]) -> float:
    """The one of these, in order, where a score with one valley is lowest: from the middle up or down, for as long as it falls."""
    best = (len(among) - 1) // 2
    least = score(among[best])
    for way in (1, -1):
        start = best
        while 0 <= best + way < len(among) and (found := score(among[best + way])) < least:
            best, least = best + way, found
        if best != start:
            break
    return among[best]


def untouched(trial: Trial) -> Arm:
    """The gain of doing nothing."""
    before = untuned(trial)
    return Arm(np.zeros_like(before.values), before.weights, before.seconds, before.metric)


def untuned(trial: Trial) -> Arm:
    """Test scores of the original."""
    task = _task(trial)
    return trial.arm("untuned", recipe(trial), lambda: _score(trial, trial.subject.model, task.test), _metric(trial))


def _metric(trial: Trial) -> tuple[str, str]:
    return ("gain in bits per query", "bits/query") if trial.subject.embeds else ("gain in bits per byte", "bits/byte")


def trained(trial: Trial) -> Sequence[Example]:
    """What the tuning task trains on."""
    return _task(trial).train


def _task(trial: Trial) -> tasks.Task:
    """The tuning task, its examples cut short."""
    embeds = trial.subject.embeds
    held = task_of(trial.subject.tuning_task, trial.seed, pairs=embeds)
    select = held.select[: PAIRS_CHOICE if embeds else CHOICE]
    test = held.test[: PAIRS_TESTED if embeds else TESTED]
    return dataclasses.replace(held, train=_short(held.train), select=_short(select), test=_short(test))


def recipe(trial: Trial) -> list[Any]:
    """What a tuned arm depends on besides its chain."""
    return [*_learnt(trial), fingerprint(_task(trial).test)]


def _learnt(trial: Trial) -> list[Any]:
    """What a learning rate does."""
    task = _task(trial)
    return [STEPS, BATCH, PAIRS, TOKENS, WORDS, fingerprint(task.train), fingerprint(task.select)]


def selected(trial: Trial, chain: Chain, rate: float, steps: int | None = None) -> float:
    """The score on the select set after so many steps (`STEPS`) at this rate; infinite if it diverged."""
    return tried(trial, chain, rate, steps)[0]


def tried(trial: Trial, chain: Chain, rate: float, steps: int | None = None) -> tuple[float, nn.Module]:
    """That score, and the model; where it diverged, as it was before."""
    try:
        model = tuned(trial, chain, rate, steps)
        values, weights = _score(trial, model, _task(trial).select)
    except NumericError:
        return np.inf, trial.subject.model
    mean = float((values * weights).sum() / weights.sum())
    return (mean, model) if np.isfinite(mean) else (np.inf, model)


def tuned(trial: Trial, chain: Chain, rate: float, steps: int | None = None) -> nn.Module:
    """The model after so many steps at this rate, by the chain's optimizer and under its schedule if it has them; frozen.

    Errors: NumericError if it diverged.
    """
    model = fork(trial.subject.model)
    moves = prepared(trial, model, chain)
    how: dict[str, Any] = {
        "batch": PAIRS if trial.subject.embeds else BATCH,
        "length": WORDS if trial.subject.embeds else TOKENS,
        "lr": rate,
        "seed": trial.seed,
    }
    train(model, _task(trial).train, tokenizer=trial.subject.tokenizer, steps=steps or STEPS, **how, **moves)
    mode(model.cpu().requires_grad_(False), "speed")
    return model


def prepared(trial: Trial, model: nn.Module, chain: Chain) -> dict[str, Any]:
    """Run the chain's steps on a model, in place, and those of its recipes; the optimizer, the schedule and the objective of training."""
    moves: Step | None = None
    during: Step | None = None
    lowers: Step | None = None
    for step in chain:
        kind, steps = get(step.method).kind, [(step, None)]
        if kind == "recipe":
            recipe, planned, _ = outline.plan(model, step)
            steps, moves = list(recipe.steps), planned or moves
        elif kind == "optimizer":
            steps, moves = [], step
        elif kind == "schedule":
            steps, during = [], step
        elif kind == "objective":
            steps, lowers = [], step
        for part, at in steps:
            _add(trial, model, part, at)
    return {
        "optimizer": optimizers.named(moves.method, **dict(moves.options)) if moves is not None else None,
        "during": schedules.named(during.method, **dict(during.options)) if during is not None else None,
        "objective": objectives.named(lowers.method, **dict(lowers.options)) if lowers is not None else None,
    }


def _add(trial: Trial, model: nn.Module, step: Step, sites: Sequence[str] | None = None) -> None:
    """Run a step, where it is not told at which sites: rewrites of weights on every linear layer but the head, others where they go."""
    method = get(step.method)
    if method.kind == "branch":
        held = texts(_task(trial).train) if method.needs else []
        read = windows(held, trial.subject.tokenizer, length=TOKENS, tokens=READ) if held else ()
        branches.run(model, step, seed=trial.seed, batches=read)
        return
    at = sites or ("*" if method.on else "all-linear")
    apply(model, (step,), at=at, stats=trial.stats if step.needs else None, seed=trial.seed)


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
