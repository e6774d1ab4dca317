"""Weights of a merge's members that are searched by a score: lower is better."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from weft.error import NumericError, OptionError, ResourceError

Way = Literal["grid", "greedy", "cma"]
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Tried:
    """Weights of the members, the score that they have, and the seconds that merging and scoring took."""

    weights: Weights
    score: float
    seconds: float


def search(way: Way, count: int, score: Callable[[Weights], float], *, trials: int | None, seed: int) -> list[Tried]:
    """Every trial, in order; the lowest score wins, the first of equals.

    grid: of two members, (1 - t, t) for evenly spaced t from 0 to 1 (11). greedy: from the best member on, each in the order of its
    own score stays in if the score is no higher with it, at weight 1. cma: CMA-ES over the logarithms of the weights, from 1 each (64).
    Errors: those of `check`; NumericError where no score is finite.
    """
    check(way, count, trials)
    tried = list[Tried]()

    def measure(weights: Sequence[float]) -> float:
        given, start = tuple(map(float, weights)), time.monotonic()
        found = score(given)
        tried.append(Tried(given, found, time.monotonic() - start))
        return found if math.isfinite(found) else math.inf

    if way == "grid":
        most = (trials or 11) - 1
        for i in range(most + 1):
            measure((1 - i / most, i / most))
    elif way == "greedy":
        _greedy(count, measure)
    else:
        _evolve(count, measure, trials or 64, seed)
    if not any(math.isfinite(t.score) for t in tried):
        got, want, fix = "NaN or infinity at all weights", "a finite score", "look at the members' own scores"
        raise NumericError("no merge has a score", where=way, got=got, want=want, fix=fix)
    return tried


def best(tried: Sequence[Tried]) -> Tried:
    """The trial of the lowest score."""
    return min((t for t in tried if math.isfinite(t.score)), key=lambda t: t.score)


def check(way: Way, count: int, trials: int | None) -> None:
    """Errors: OptionError for another number of members or trials than the search takes; ResourceError without its package."""
    if count < 2 or (way == "grid" and count != 2):
        want = "2" if way == "grid" else "2 or more"
        fix = "the base may be one of them" if count < 2 else "greedy and cma take more"
        raise OptionError(f"{way} searches no such weights", where="models", got=count, want=want, fix=fix)
    if trials is not None and (way == "greedy" or trials < 2):
        got, want = trials, "none: greedy tries each member twice" if way == "greedy" else "2 or more"
        raise OptionError(f"{way} takes no such number", where="trials", got=got, want=want, fix="leave it out")
    if way == "cma":
        _package()


def _greedy(count: int, measure: Callable[[Sequence[float]], float]) -> None:
    alone = [measure([float(i == k) for i in range(count)]) for k in range(count)]
    first, *others = sorted(range(count), key=alone.__getitem__)
    chosen, least = {first}, alone[first]
    for k in others:
        found = measure([float(i in chosen | {k}) for i in range(count)])
        if found <= least:
            chosen, least = chosen | {k}, found


def _evolve(count: int, measure: Callable[[Sequence[float]], float], trials: int, seed: int) -> None:
    measure([1.0] * count)
    how = {"seed": seed + 1, "maxfevals": trials - 1, "verbose": -9}
    evolution = _package().CMAEvolutionStrategy([0.0] * count, 0.5, how)
    while not evolution.stop():
        points = evolution.ask()
        evolution.tell(points, [measure([math.exp(x) for x in point]) for point in points])


def _package() -> Any:
    try:
        return import_module("cma")
    except ImportError as e:
        got, fix = "it is not installed", "pip install 'weft[search]', or search by grid or greedy"
        raise ResourceError("a package is missing", where="cma", got=got, want="cma", fix=fix) from e
