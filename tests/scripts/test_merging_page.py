"""The page on merging: its commands, as they stand there, run one after another."""

from __future__ import annotations

from pathlib import Path

import pytest

import weft
from weft.lab import metrics, models, tasks

from .shown import scores


def test_three_fine_tunes_become_one_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command works; the merged model is better on the task than the first one, and so is the small one, within its bytes."""
    monkeypatch.chdir(tmp_path)
    small = {"--steps": "24", "--limit": "8"}
    more = {"gptq": ["--tokens", "512"], "eval": ["--json"]}
    merged, patched = scores("merging.md", "Merge three fine-tunes and keep the file small", small, more)
    model = weft.load(models.resolve("ref-lm"))
    values, weights = metrics.response_bits(model, weft.tokenizer(model), tasks.task("dates").test[:8], batch=8)
    start = float((values * weights).sum() / weights.sum())
    assert merged < start - 0.5 and patched < start - 0.2
    of = {n: sum(p.stat().st_size for p in (tmp_path / n).glob("*.safetensors")) for n in ("merged", "delta", "small")}
    assert of["delta"] < 0.06 * of["merged"] and of["small"] < 0.33 * of["merged"]
