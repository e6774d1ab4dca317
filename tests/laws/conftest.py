"""Counts, while tests are collected, how many of them exercise each node and each method."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from weft.engine import names

from .cases import KINDS, instances, nodes_in

CASES: pytest.StashKey[Counter[str]] = pytest.StashKey()
_METHODS = set(names())


@functools.cache
def _nodes(kind: str) -> set[str]:
    return nodes_in(next(instances(kind)))


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note what this test's parameters stand for, before any test is deselected."""
    given = getattr(item, "callspec", None)
    counts = item.config.stash.setdefault(CASES, Counter())
    if given is None or item.path.parent.name != "laws":
        return
    values = {v for v in given.params.values() if isinstance(v, str)}
    counts.update(values & _METHODS)
    if given.params.get("kind") in KINDS:
        counts.update(_nodes(given.params["kind"]))


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Counter[str]:
    """Tests collected in this session by node class and by method."""
    return request.config.stash[CASES]
