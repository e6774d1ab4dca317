"""Searches of weights on scores that are known: what they try, in what order, and that none ends worse than what it tried."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from weft.engine.coefficients import Tried, Weights, best, check, search
from weft.error import NumericError, OptionError, ResourceError


def bowl(at: Sequence[float]) -> object:
    """How far the members' shares are from these."""
    return lambda w: sum((x / sum(w) - y) ** 2 for x, y in zip(w, at, strict=True))


def test_a_grid_goes_from_one_to_the_other() -> None:
    tried = search("grid", 2, bowl([0.25, 0.75]), trials=5, seed=0)  # type: ignore[arg-type]
    assert [t.weights for t in tried] == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    assert best(tried).weights == (0.25, 0.75) and best(tried).score == 0
    assert len(search("grid", 2, lambda w: w[0], trials=None, seed=0)) == 11


def test_greedy_keeps_what_does_not_hurt() -> None:
    """Members in the order of their own scores; one that hurts stays out, one that changes nothing comes in."""
    scores = {(0, 0, 1): 1.0, (1, 0, 0): 2.0, (0, 1, 0): 3.0, (1, 0, 1): 1.5, (0, 1, 1): 1.0}
    asked: list[Weights] = []

    def score(w: Weights) -> float:
        asked.append(w)
        return scores[w]

    tried = search("greedy", 3, score, trials=None, seed=0)
    assert asked == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)]
    assert best(tried).score == 1.0 and best(tried).weights == (0, 0, 1)


def test_evolution_starts_from_equal_weights_and_finds_the_bowl() -> None:
    """Within its trials, twice the same, by another seed otherwise."""
    pytest.importorskip("cma")
    runs = [search("cma", 3, bowl([0.1, 0.6, 0.3]), trials=120, seed=s) for s in (0, 0, 1)]  # type: ignore[arg-type]
    assert runs[0][0].weights == (1, 1, 1) and all(len(r) <= 120 + 7 for r in runs)
    first, again, other = ([t.weights for t in r] for r in runs)
    assert first == again != other
    assert best(runs[0]).score < 1e-3 < runs[0][0].score


def test_what_is_not_finite_never_wins() -> None:
    tried = search("grid", 2, lambda w: math.nan if w[0] > 0.5 else w[0], trials=5, seed=0)
    assert best(tried).weights == (0, 1)
    with pytest.raises(NumericError, match="finite score"):
        search("greedy", 2, lambda w: math.inf, trials=None, seed=0)


def test_bad_searches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for way, count, trials in (
        ("grid", 3, None),
        ("grid", 1, None),
        ("greedy", 1, None),
        ("greedy", 3, 5),
        ("cma", 3, 1),
    ):
        with pytest.raises(OptionError):
            check(way, count, trials)  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(ResourceError, match=r"weft\[search\]"):
        check("cma", 3, None)


def test_equals_go_to_the_first() -> None:
    assert best([Tried((1, 0), 1.0, 0), Tried((0, 1), 1.0, 0)]).weights == (1, 0)
