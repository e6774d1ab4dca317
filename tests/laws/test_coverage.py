"""The law of coverage: no node and no method goes untested. It counts what was collected: run the whole folder."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from weft.engine import get, names
from weft.expr import NODES

from . import (
    test_branches,
    test_cuts,
    test_merges,
    test_nodes,
    test_objectives,
    test_optimizers,
    test_probes,
    test_recipes,
    test_relax,
    test_rewrites,
    test_routed,
    test_schedules,
    test_searches,
    test_transports,
)
from .cases import KINDS, REWRITES, instances

LEAST = 3
"""Kinds of expression, at least, in which every node occurs."""


@functools.cache
def roots() -> dict[str, bool]:
    """The nodes at the root of some expression, and whether it is a matrix."""
    return {type(e).__name__: e.is_matrix for kind in reversed(KINDS) for e in instances(kind)}


@pytest.mark.parametrize("node", NODES)
def test_every_node_is_covered(node: str, cases: Counter[str]) -> None:
    """Each node class is at the root of some expression, and every law runs on at least three kinds that hold it."""
    laws = test_nodes.LAWS if roots()[node] else test_routed.LAWS
    assert cases[node] >= LEAST * len(laws), "too few laws were collected: run the whole of tests/laws"


@pytest.mark.parametrize("method", names())
def test_every_method_is_covered(method: str, cases: Counter[str]) -> None:
    """Each method belongs to a kind that has a suite, and every law of it runs: for a rewrite every pair too."""
    least = {
        "rewrite": len(test_rewrites.LAWS) + 2 * len(REWRITES) - 1,
        "merge": len(test_merges.LAWS) + 3,
        "search": len(test_searches.LAWS),
        "probe": len(test_probes.LAWS),
        "branch": len(test_branches.MODELS) + len(test_branches.LAWS),
        "cut": len(test_cuts.MODELS) + len(test_cuts.LAWS),
        "objective": len(test_objectives.LAWS),
        "optimizer": len(test_optimizers.LAWS),
        "schedule": len(test_schedules.LAWS),
        "recipe": len(test_recipes.LAWS),
        "relax": len(test_relax.LAWS),
        "transport": len(test_transports.MODELS) + len(test_transports.LAWS),
    }
    assert get(method).kind in least, f"kind {get(method).kind} has no suite of laws"
    assert cases[method] >= least[get(method).kind], "too few laws were collected: run the whole of tests/laws"


@pytest.mark.parametrize("method", names())
def test_every_method_makes_a_claim(method: str) -> None:
    """A method is named as its file, says what it does, and has a claim to prove."""
    made = get(method)
    assert made.name == method and made.doc and method in made.proofs and all(p.claim for p in made.proofs.values())
    assert all(f.description for f in made.options.model_fields.values())
