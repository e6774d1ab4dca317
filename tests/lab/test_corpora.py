"""Texts and tasks: the same each time, sets that do not meet, and nothing to train on from where the test comes."""

from __future__ import annotations

from functools import cache

import pytest

from weft.error import OptionError, ResourceError
from weft.lab import corpora, tasks
from weft.learn.data import Example, Pair, Response, Text


@cache
def task(name: str) -> tasks.Task:
    """A task, read once for all tests."""
    return tasks.task(name)


def said(examples: list[Example]) -> list[str]:
    """What examples say."""
    texts = (Text, "text"), (Pair, "query"), (Response, "prompt")
    return [next(getattr(e, field) for kind, field in texts if isinstance(e, kind)) for e in examples]


def test_headers_are_the_same_each_time_and_another_order_for_another_seed() -> None:
    """Content and order depend on the seed alone."""
    first, again = (corpora.cpp_headers(corpora.HEADERS_HELD_OUT, 40_000) for _ in range(2))
    assert first == again and first
    assert [t.name for t in corpora.cpp_headers(corpora.HEADERS_HELD_OUT, 40_000, seed=1)] != [t.name for t in first]


def test_pieces_keep_to_the_size_that_was_asked_for() -> None:
    """Enough, and at most one piece too much."""
    made = corpora.python_source(["packaging", "yaml"], 30_000)
    size = sum(len(t.text.encode()) for t in made)
    assert 30_000 <= size < 30_000 + 5000 and all(len(t.text) <= 4096 for t in made)


def test_python_to_train_on_and_to_test_on_come_from_other_packages() -> None:
    """No package is in both lists, and every example's name says where it is from."""
    assert not set(corpora.TRAIN) & set(corpora.HELD_OUT)
    assert not set(corpora.HEADERS_TRAIN) & set(corpora.HEADERS_HELD_OUT)
    for name in ("python", "docstrings"):
        t = task(name)
        learnt = {e.name.split("/")[0] for e in (*t.calibration, *t.train, *t.select)}
        assert learnt <= set(corpora.TRAIN) and {e.name.split("/")[0] for e in t.test} <= set(corpora.HELD_OUT)


@pytest.mark.parametrize("name", tasks.names())
def test_sets_do_not_meet(name: str) -> None:
    """Calibration, training, choosing and testing share no text."""
    t = task(name)
    sets = [set(said(part)) for part in (t.calibration, t.train, t.select, t.test)]
    assert all(sets) and len(set().union(*sets)) == sum(map(len, sets))


def test_another_seed_turns_the_order_of_what_is_learnt_from_and_nothing_else() -> None:
    """Calibration and training hold the same texts, from another one on."""
    zero, one = task("cpp"), tasks.task("cpp", seed=1)
    assert zero.select == one.select and zero.test == one.test
    for a, b in ((zero.train, one.train), (zero.calibration, one.calibration)):
        assert a != b and sorted(said(a)) == sorted(said(b))


def test_docstring_pairs_do_not_hold_the_docstring() -> None:
    """A positive is the source without what the query says."""
    pairs = [e for e in task("docstrings").test if isinstance(e, Pair)]
    assert len(pairs) > 200 and not any(p.query in p.positive for p in pairs)
    assert all(p.positive.lstrip().startswith("def ") for p in pairs)


def test_unknown_names_are_refused() -> None:
    """A task and a package that do not exist."""
    with pytest.raises(OptionError, match="unknown task"):
        tasks.task("poems")
    with pytest.raises(ResourceError, match="not installed"):
        corpora.python_source(["no_such_package_here"], 1000)
