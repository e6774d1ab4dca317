"""The merged arms of a claim: members tuned from the lab model on other tasks, mixtures of them, seeds or rates, then merged."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from weft.engine import coefficients, combine
from weft.engine.run import Chain, Step, apply, chain_key
from weft.expr import unfrozen
from weft.lab import metrics, tasks
from weft.lab.distance import padded
from weft.lab.trial import Arm, Trial, task_of
from weft.learn.data import Example, Pair, Response, fingerprint
from weft.learn.train import train
from weft.model import expressions, fork, match, places, set_expressions
from weft.model.blocks import blocks
from weft.stats import collect, fishers
from weft.store.cache import key

TASKS: Mapping[str, tuple[str, ...]] = {"ref-lm": ("sorting", "dates", "arithmetic"), "minilm": ("naming",)}
"""What members of each lab model are tuned on; those that differ by their seed, on the first."""
Members = Literal["tasks", "seeds", "rates", "mixtures", "views"]
VIEWS: Mapping[str, tuple[str, ...]] = {"minilm": ("naming", "docstrings")}
"""What an embedding model learns of one thing from its names, and from its texts."""
COUNT = 3
"""Members that differ by their seed."""
RATES = (1.0, 0.25, 4.0, 16.0)
"""Those that differ by their rate are tuned at these multiples of it."""
STEPS = 24
BATCH = 8
TOKENS, WORDS = 64, 32
"""Tokens of a training window, and of either text of a pair."""
READ = 2048
"""Tokens of its training texts that a member's evidence is of."""
TRIALS = {"cma": 12}
"""Merges that a search tries, where it can be told."""
RATE = 5e-4
"""Peak learning rate; for pairs a tenth of it."""
NOISE = 0.15
"""Share of the characters of a noisy prompt that a stray one follows."""
TESTED = 100
"""Test examples of a task."""
CHOICE = 48
"""Examples that the best member is chosen by."""

Of = tuple[str, int] | tuple[str, int, float]
"""A member: its task, or several with + between them, its seed, and its rate as a multiple of the usual one."""


def able(model: str, kind: Members, count: int | None) -> bool:
    """Whether a lab model has tasks for such members."""
    if kind == "views":
        return model in VIEWS
    least = {"seeds": 1, "rates": 1, "mixtures": 3, "tasks": count or 2}
    return len(TASKS.get(model, ())) >= least[kind]


def members(trial: Trial, kind: Members, count: int | None) -> Sequence[Of]:
    """The members of a trial: `count` of them, or 3 seeds, all rates, all tasks, all tasks but one in every way, or both views."""
    if kind == "views":
        return [(name, trial.seed) for name in VIEWS[trial.subject.name]]
    known = TASKS[trial.subject.name]
    if kind == "seeds":
        size = count or COUNT
        return [(known[0], size * trial.seed + i) for i in range(size)]
    if kind == "rates":
        return [(known[0], trial.seed, times) for times in RATES[:count]]
    if kind == "mixtures":
        return [("+".join(some), trial.seed) for some in itertools.combinations(known, len(known) - 1)][:count]
    return [(name, trial.seed) for name in known[:count]]


def gained(
    step: Step,
    trial: Trial,
    of: Sequence[Of],
    way: Chain = (),
    search: coefficients.Way | None = None,
    smoothing: float = 0.0,
    noisy: bool = False,
) -> Arm:
    """How much lower the test scores of the members' tasks are after they were merged, tasks counting alike.

    `way` makes what is tuned trainable, all of every linear layer if it is empty. `search` finds the members' weights on the examples
    to choose by. `smoothing`: of the labels that members are tuned on. `noisy`: what is tested are noisy prompts.
    """
    tested = disturbed(of) if noisy else of

    def make() -> metrics.Scores:
        models = [member(trial, m, way, smoothing) for m in of]

        @functools.cache
        def look(i: int) -> combine.Seen:
            return _seen(trial, models[i], of[i], step)

        def merged(weights: Sequence[float] | None) -> nn.Module:
            how: dict[str, Any] = {"base": trial.subject.model, "weights": weights, "seed": trial.seed, "look": look}
            return combine.run(combine.plan(models, step, **how))[0]

        found = None
        if search is not None:
            tried = coefficients.search(
                search, len(of), lambda w: _choice(trial, merged(w), of), trials=TRIALS.get(search), seed=trial.seed
            )
            found = coefficients.best(tried).weights
        return _gain(trial, merged(found), tested)

    about = [chain_key((step,)), chain_key(way), search, TRIALS.get(search or ""), smoothing, *_recipe(trial, of)]
    about += _tests(trial, tested)
    return trial.arm("merged", about, make, metric(trial))


def _seen(trial: Trial, model: nn.Module, of: Of, step: Step) -> combine.Seen:
    """What a member's own data says of it, as far as the merge asks."""
    needs = step.needs - {"base"}
    if not needs:
        return combine.Seen()
    found = padded(_texts(short_task(trial, *of[:2]).train), trial.subject.tokenizer, length=TOKENS, tokens=READ)
    stats = collect(model, found, trial.store.folder / "evidence", seed=trial.seed) if "gram" in needs else None
    return combine.Seen(stats, fishers(model, found, trial.store, seed=trial.seed) if "fisher" in needs else {})


def _texts(examples: Sequence[Example]) -> list[str]:
    """What a model reads of these examples."""
    made: list[str] = []
    for e in examples:
        made += (
            [e.query, e.positive] if isinstance(e, Pair) else [e.prompt + e.response] if isinstance(e, Response) else []
        )
    return made


def mean(trial: Trial, of: Sequence[Of], way: Chain = ()) -> Arm:
    """The mean over the members of what each gains on all of these tasks."""
    arms = [_alone(trial, m, of, way) for m in of]
    values = np.mean([a.values for a in arms], axis=0)
    return dataclasses.replace(arms[0], values=values, seconds=sum(a.seconds for a in arms))


def best(trial: Trial, of: Sequence[Of], way: Chain = ()) -> Arm:
    """What the member gains that scores best on the examples to choose by."""

    def make() -> metrics.Scores:
        means = [_choice(trial, member(trial, m, way), of) for m in of]
        return np.array(means), np.ones(len(means))

    scores = trial.arm("members chosen", [chain_key(way), *_recipe(trial, of)], make, metric(trial))
    return _alone(trial, of[int(np.argmin(scores.values))], of, way)


def _choice(trial: Trial, model: nn.Module, of: Sequence[Of]) -> float:
    """The score on the examples to choose by, those of all tasks together."""
    values, weights = score(trial, model, [e for name in _names(of) for e in short_task(trial, name).select])
    return float((values * weights).sum() / weights.sum())


def disturbed(of: Sequence[Of]) -> list[Of]:
    """The same tasks with noisy prompts."""
    return [(f"{name}~", seed) for name, seed, *_ in of]


def member(trial: Trial, of: Of, way: Chain = (), smoothing: float = 0.0) -> nn.Module:
    """The lab model with all its linear layers tuned on a task, in float32, or what `way` makes trainable; kept for all claims."""
    name, seed, *times = of
    task, base = short_task(trial, name, seed), trial.subject.model
    sites = match(base, "all-linear")
    rate = (RATE / 10 if trial.subject.embeds else RATE) * sum(times or [1.0])
    length = WORDS if trial.subject.embeds else TOKENS

    def start() -> nn.Module:
        model = fork(base)
        if way:
            apply(model, way, at="all-linear", seed=seed)
        else:
            set_expressions(model, {n: unfrozen(expressions(base)[n]) for n in sites})
        return model

    def make() -> dict[str, Tensor]:
        model = start()
        how: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "length": length, "lr": rate, "seed": seed}
        how["label_smoothing"] = smoothing
        train(model, task.train, tokenizer=trial.subject.tokenizer, **how)
        return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}

    about = [
        trial.subject.fingerprint,
        trial.code,
        chain_key(way),
        STEPS,
        BATCH,
        length,
        rate,
        seed,
        smoothing,
        fingerprint(task.train),
    ]
    held, model = trial.store.tensors("lab-members", key(*about), make), start()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in held:
                p.copy_(held[n])
    if not way:
        for n in sites:
            places(model)[n].dtype = torch.float32
    return model.requires_grad_(False)


def _alone(trial: Trial, one: Of, of: Sequence[Of], way: Chain = ()) -> Arm:
    """What one member gains on the tasks of all."""
    about = [one, chain_key(way), *_recipe(trial, of)]
    return trial.arm("member", about, lambda: _gain(trial, member(trial, one, way), of), metric(trial))


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
    return list(dict.fromkeys(part for name, *_ in of for part in name.split("+")))


def short_task(trial: Trial, name: str, seed: int = 0) -> tasks.Task:
    """A task, its sets cut short; of several, the examples of each in turn."""
    first, *others = (_of(part, seed, trial.subject.embeds) for part in name.split("+"))
    held = dataclasses.replace(first, select=first.select[:CHOICE], test=first.test[:TESTED])
    if not others:
        return held
    turns = zip(first.train, *(t.train for t in others), strict=False)
    return dataclasses.replace(held, name=name, train=[e for turn in turns for e in turn])


def _of(name: str, seed: int, embeds: bool) -> tasks.Task:
    """A task; with ~ behind its name, with noisy prompts."""
    held = task_of(name.removesuffix("~"), seed, pairs=embeds)
    if not name.endswith("~"):
        return held
    noise = random.Random(f"{name}/{seed}")  # noqa: S311
    sets = ((getattr(held, part), part) for part in ("train", "select", "test"))
    return dataclasses.replace(held, name=name, **{part: [_noisy(e, noise) for e in some] for some, part in sets})


def _noisy(e: Example, noise: random.Random) -> Example:
    """A prompt with stray characters, which leave what is asked as it is; swapped ones would ask for another answer."""
    if not isinstance(e, Response):
        return e
    asked = "".join(c + (noise.choice("~^|`") if noise.random() < NOISE else "") for c in e.prompt)
    return dataclasses.replace(e, prompt=asked)


def patched(trial: Trial, step: Step, share: float) -> Arm:
    """How much lower the score on noisy prompts of the second task is after its member was patched by one of the first with noisy prompts.

    The merge is given the clean member of the first task as the noisy one's base, and the first share of the blocks.
    """
    first, second = TASKS[trial.subject.name][:2]
    about = disturbed([(second, trial.seed)])

    def make() -> metrics.Scores:
        noisy, clean, before = (member(trial, (name, trial.seed)) for name in (f"{first}~", first, second))
        path, stack = blocks(before)
        at = [f"{path}.{i}.*" for i in range(max(1, round(share * len(stack))))]
        after = combine.run(combine.plan([noisy], step, base=[before, clean], at=at, seed=trial.seed))[0]
        (values, weights), (now, _) = (_tested(trial, m, about) for m in (before, after))
        return values - now, weights

    of = [(name, trial.seed) for name in (f"{first}~", first, second, f"{second}~")]
    return trial.arm("patched", [chain_key((step,)), share, *_recipe(trial, of)], make, metric(trial))


def unpatched(trial: Trial) -> Arm:
    """The gain of no patch."""
    return nothing(trial, disturbed([(TASKS[trial.subject.name][1], trial.seed)]))


def _tests(trial: Trial, of: Sequence[Of]) -> list[Any]:
    return [fingerprint(short_task(trial, name).test) for name in _names(of)]


def _recipe(trial: Trial, of: Sequence[Of]) -> list[Any]:
    """What a merged arm depends on besides its method."""
    trained = [[seed, times, fingerprint(short_task(trial, name, seed).train)] for name, seed, *times in of]
    return [STEPS, BATCH, TOKENS, WORDS, RATE, CHOICE, trained, _tests(trial, of)]
