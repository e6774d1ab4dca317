"""Candidates: judged by a sample of a large weight's rows, they have the bytes of the whole and nearly its loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from weft.fitting import candidates
from weft.fitting.data import resolve
from weft.fitting.settings import Settings
from weft.fitting.work import Work
from weft.progress import Silent
from weft.stats import Stats, collect
from weft.store.cache import Cache


@pytest.fixture(scope="module")
def held(
    lm: Path, examples: Path, small: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Work, Stats, tuple[str, ...]]:
    """A model, its evidence, and the group of its tied embedding, the largest weight."""
    folder = tmp_path_factory.mktemp("candidates")
    work = Work(str(lm), str(examples), small, Cache(folder), Silent())
    texts = work._batches(resolve(work.data, embeds=False, seed=0).calibration, small.tokens)
    stats = collect(work.plain, texts, folder / "evidence", seed=0, progress=Silent())
    return work, stats, next(g for g in stats.groups if any("embed" in n for n in g))


def test_a_sample_of_rows_stands_for_all(
    held: tuple[Work, Stats, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are exact for every candidate, losses right within a few percent, and what is not rowwise is not sampled."""
    work, stats, group = held
    wanted = candidates.chains(bits=(2, 4, 8), widths=(0, 32))
    whole, few = [], []
    for rows, made in ((1 << 30, whole), (512, few)):
        monkeypatch.setattr(candidates, "ROWS", rows)
        made.append(candidates._solve(work.plain, group, wanted, stats, 0)[group[0]])
    assert whole[0]["bytes"] == few[0]["bytes"]
    pairs = [(a, b) for a, b in zip(whole[0]["loss"], few[0]["loss"], strict=True) if a]
    ratio = np.array([b / a for a, b in pairs])
    assert len(pairs) > 10 and np.abs(ratio - 1).max() < 0.1
    assert [a is None for a in whole[0]["loss"]] == [b is None for b in few[0]["loss"]]


def test_the_sample_is_the_size_that_was_asked_for_and_unbiased(
    held: tuple[Work, Stats, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most ROWS rows (fewer where some are certain); the weights of what was drawn add up to those of all rows, over seeds."""
    work, stats, names = held
    monkeypatch.setattr(candidates, "ROWS", 400)
    totals, counts = [], []
    for seed in range(8):
        group = candidates.group_of(work.plain, names, stats, seed=seed)
        (site,) = candidates._sampled(group).sites
        counts.append(site.now.shape[0])
        totals.append(float(site.evidence[0].weight.sum()))
        assert site.original.shape[0] == counts[-1] == len(site.evidence[-1].weight)
    (full,) = candidates.group_of(work.plain, names, stats, seed=0).sites
    assert all(200 <= c <= 401 for c in counts)
    assert np.mean(totals) == pytest.approx(float(full.evidence[0].weight.sum()), rel=0.1)
