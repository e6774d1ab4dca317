"""The arms of a claim on what tuning does to weights: two chains, trained until they gain alike, and then probed."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from weft.engine import Findings, combine, get
from weft.engine.run import Chain, Step, chain_key
from weft.lab import metrics
from weft.lab.distance import windows
from weft.lab.trial import Arm, Trial, task_of, texts
from weft.lab.tuning import STEPS, TOKENS, rate, recipe, selected, trained, tuned
from weft.model import expressions, set_expressions
from weft.store.cache import key

LADDER = (1, 2, 3, 4, 6, STEPS)
"""Steps that an arm which gains more than the other is trained for instead."""
SHARE = 0.1
"""Of the weights, those that a probe chooses; and of their entries, those whose change is kept."""
SEEN = 512
"""Tokens of the tuning texts that a probe reads."""
TEXTS = 24
"""Texts of the other domain."""


def probed(trial: Trial, *, chain: Chain, other: Chain, below: bool, probe: Step, number: str) -> Arm:
    """A number that a probe gives of every weight, after training this chain at its rate for the steps of `steps_of`."""
    lr = rate(trial, chain)

    def make() -> metrics.Scores:
        model = tuned(trial, chain, lr, steps_of(trial, chain, other, below))
        look = get(probe.method)
        given = (_read(trial),) if "data" in look.needs else ()
        found: Findings = look(model, *given, **dict(probe.options))
        values = np.array([float(at[number]) for at in found.sites.values()])
        return values, np.ones_like(values)

    what = [chain_key(chain), chain_key(other), lr, below, chain_key((probe,)), number, *recipe(trial)]
    return trial.arm("probe", what, make, (number, "a weight"))


def halfway(trial: Trial, probe: Step | None, number: str) -> Arm:
    """Bits a byte of the texts that distances are taken on, half way to a model that was tuned on the other domain.

    With a probe, which looks at the tuned model on those it was tuned on, the weights with the largest numbers keep their largest changes
    alone.
    """
    full, base = (Step.of("full"),), trial.subject.model
    held = texts(task_of(trial.subject.distance_task, trial.seed).test)[:TEXTS]
    lr = rate(trial, full)

    def make() -> metrics.Scores:
        model = tuned(trial, full, lr)
        half, _ = combine.run(combine.plan([model], Step.of("task_arithmetic", scale=0.5), base=base))
        if probe is not None:
            sites = get(probe.method)(model, _read(trial), **dict(probe.options)).sites
            sharp = sorted(sites, key=lambda n: -sites[n][number])[: max(1, round(SHARE * len(sites)))]
            few = combine.plan([model], Step.of("ties", density=SHARE, scale=0.5), base=base, at=sharp)
            trimmed, _ = combine.run(few)
            set_expressions(half, {n: expressions(trimmed)[n] for n in sharp})
        return metrics.bits_per_byte(half, trial.subject.tokenizer, held, length=trial.subject.length)

    what = [chain_key((probe,)) if probe else "", number, lr, SHARE, SEEN, held, *recipe(trial)]
    return trial.arm("half way", what, make, ("bits per byte of another domain", "bits/byte"))


def _read(trial: Trial) -> list[dict[str, Tensor]]:
    """What a probe reads: texts that are tuned on."""
    return windows(texts(trained(trial)), trial.subject.tokenizer, length=TOKENS, tokens=SEEN)


def steps_of(trial: Trial, chain: Chain, other: Chain, below: bool) -> int:
    """All steps for the chain that gains less on the select set; for the better one as many as leave it next to that gain.

    Of the ladder, the most steps that gain no more (`below`; one step at least), or the fewest that gain no less.
    """
    goal = max(_score(trial, c, LADDER[-1]) for c in (chain, other))
    if _score(trial, chain, LADDER[-1]) >= goal:
        return LADDER[-1]
    low, high = -1, len(LADDER) - 1  # LADDER[high] gains no less than the goal
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _score(trial, chain, LADDER[middle]) <= goal else (middle, high)
    return LADDER[max(0, low) if below else high]


def _score(trial: Trial, chain: Chain, steps: int) -> float:
    """The select score after so many steps; the lower, the more was gained."""
    lr = rate(trial, chain)
    name = key("select", trial.subject.fingerprint, trial.seed, trial.code, chain_key(chain), lr, steps, *recipe(trial))
    held = trial.store.json("lab-rates", name, lambda: {"score": str(selected(trial, chain, lr, steps))})
    return float(held["score"])
