"""The tasks of the lm-evaluation-harness on a woven model, through the harness's own class for transformers models."""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.error import ConflictError, OptionError, PathError, ResourceError, raise_all, whole
from weft.learn.tokenizer import tokenizer

RESAMPLES = 1000
"""Resamples of a standard error that has no formula, such as that of an F1 score."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: its value, its standard error where the harness knows one, and of how many documents."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    better: str
    documents: int | None


def evaluate_tasks(
    model: nn.Module,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    batch: int = 8,
) -> list[TaskScore]:
    """Scores of the harness's tasks, groups or tags of these names; `include_path` is a folder of your own task files.

    `limit` takes each task's first documents only. What a task's files name as functions is run: they are programs. Data that is
    not in Hugging Face's cache is downloaded, unless HF_HUB_OFFLINE is set.
    Errors: ResourceError without `weft[eval]` or a task's data; OptionError for an unknown task; PathError;
    ConflictError for a model that generates no text, and for tasks that run generated code or show pictures.
    """
    whole(batch=batch, tasks=len(tasks), **({} if limit is None else {"limit": limit}))
    lm = _wrapped(model, batch)
    with _seeded(), redirect_stdout(sys.stderr):
        found = _load(list(dict.fromkeys(tasks)), None if include_path is None else Path(include_path))
        import lm_eval

        made: Any = lm_eval.evaluate(lm, found, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    return [score for name, values in made["results"].items() for score in _scores(name, values, made)]


def _wrapped(model: nn.Module, batch: int) -> Any:
    """The model as the harness wants it. Errors: ResourceError; ConflictError."""
    if not getattr(model, "can_generate", lambda: False)():
        want, fix = "a model that generates text", "weft eval --data scores embedding models"
        raise ConflictError(
            "the harness's tasks are for language models",
            where=type(model).__name__,
            got="no language model head",
            want=want,
            fix=fix,
        )
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as e:
        fix, want = 'pip install "weft[eval]"', "lm_eval"
        raise ResourceError(
            "the evaluation harness is not installed", where="tasks", got=str(e), want=want, fix=fix
        ) from e
    words = tokenizer(model)
    if words.eos_token_id is None:
        where, want = type(words).__name__, "one: the harness ends answers by it"
        raise ConflictError(
            "the tokenizer has no end token", where=where, got="none", want=want, fix="set eos_token in its files"
        )
    return HFLM(model, tokenizer=words, batch_size=batch)  # type: ignore[arg-type]


def _load(names: list[str], folder: Path | None) -> Any:
    """The tasks, with their data. Those of `folder` come first; the harness's own, some 14000, are read only if asked for."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        want, fix = "a folder of YAML files", "give the folder, not the file"
        raise PathError("no tasks there", where=str(folder), got="no folder", want=want, fix=fix)
    with _told(names):
        known = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= set(known.all_subtasks):
            known = TaskManager(include_path=folder)
    _all_known(names, known.all_tasks)
    with _told(names):
        found = known.load(names)
    for name, task in found["tasks"].items():
        _may_run(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return found


@contextmanager
def _told(names: Sequence[str]) -> Generator[None]:
    """Whatever goes wrong in a task's own files, its data or the network, as a ResourceError."""
    try:
        yield
    except Exception as e:
        got, want = f"{type(e).__name__}: {e}", "its files and its data"
        fix = "check the task's file; data comes from the hub unless HF_HUB_OFFLINE is set"
        raise ResourceError("a task cannot be loaded", where=", ".join(names), got=got, want=want, fix=fix) from e


def _all_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Errors: OptionError naming every task that is not known, with those of like names."""
    fix = "check the name, or give --include-path"
    raise_all(
        [
            OptionError(
                "unknown task", where="tasks", got=n, want=", ".join(get_close_matches(n, known)) or "a task", fix=fix
            )
            for n in sorted(set(names) - set(known))
        ]
    )


def _may_run(name: str, task: Any) -> None:
    """Errors: ConflictError for a task that would run what a model writes, or that shows pictures."""
    unsafe = getattr(task, "UNSAFE_CODE", False)
    if unsafe or getattr(task, "MULTIMODAL", False):
        got = "it runs the code that a model writes" if unsafe else "it shows more than text"
        fix = "run lm_eval itself, in a sandbox" if unsafe else "leave it out"
        raise ConflictError("this task is not run", where=name, got=got, want="a task of text alone", fix=fix)


@contextmanager
def _seeded() -> Generator[None]:
    """Randomness as the harness seeds it, and afterwards the caller's again."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    plain, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(numbers)


def _scores(name: str, values: dict[str, Any], made: Any) -> Iterator[TaskScore]:
    """A row for every number under METRIC,FILTER; a group that has no score of its own has none."""
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        higher = made["higher_is_better"].get(name, {}).get(metric)
        yield TaskScore(
            name,
            metric,
            filtered,
            float(value),
            float(error) if isinstance(error, int | float) else None,
            {True: "higher", False: "lower"}.get(higher, ""),
            made["n-samples"].get(name, {}).get("effective"),
        )
