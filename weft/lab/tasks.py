"""Tasks without downloads: texts to calibrate, tune and choose on, and others, from elsewhere, to test on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from weft.error import OptionError
from weft.lab import corpora, generated
from weft.learn.data import Example


@dataclass(frozen=True)
class Task:
    """Disjoint sets of examples. `train` and `calibration` come in another order for another seed; the others never change."""

    name: str
    kind: Literal["lm", "retrieval", "response"]
    calibration: list[Example]
    train: list[Example]
    select: list[Example]
    test: list[Example]


def names() -> list[str]:
    """Every task."""
    return list(_TASKS)


def task(name: str, *, seed: int = 0) -> Task:
    """The task of that name. Errors: OptionError for an unknown one."""
    if name not in _TASKS:
        raise OptionError("unknown task", where="task", got=name, want=", ".join(_TASKS), fix="choose one of these")
    return _TASKS[name](seed)


def _python(seed: int) -> Task:
    test: list[Example] = [*corpora.python_source(corpora.HELD_OUT, 160_000)]
    return _lm("python", [*corpora.python_source(corpora.TRAIN, 1_200_000)], test, seed)


def _cpp(seed: int) -> Task:
    test: list[Example] = [*corpora.cpp_headers(corpora.HEADERS_HELD_OUT, 160_000)]
    return _lm("cpp", [*corpora.cpp_headers(corpora.HEADERS_TRAIN, 1_200_000)], test, seed)


def _docstrings(seed: int) -> Task:
    pairs = corpora.docstring_pairs(corpora.TRAIN, 2400)
    said = {p.query for p in pairs}
    test: list[Example] = [p for p in corpora.docstring_pairs(corpora.HELD_OUT, 300) if p.query not in said]
    calibration, train = _turned(pairs[200:800], seed), _turned(pairs[800:], seed)
    return Task("docstrings", "retrieval", calibration, train, [*pairs[:200]], test)


def _generated(name: str, seed: int) -> Task:
    made = generated.parts(name)
    calibration, train = _turned(made.calibration, seed), _turned(made.train, seed)
    return Task(name, "response", calibration, train, made.select, made.test)


def _lm(name: str, texts: list[Example], test: list[Example], seed: int) -> Task:
    a, b = len(texts) // 10, len(texts) // 3
    return Task(name, "lm", _turned(texts[a:b], seed), _turned(texts[b:], seed), texts[:a], test)


def _turned(examples: Sequence[Example], seed: int) -> list[Example]:
    """The examples from another place on: the order changes with the seed, the set does not."""
    at = seed * 7919 % max(1, len(examples))
    return [*examples[at:], *examples[:at]]


_TASKS: dict[str, Callable[[int], Task]] = {
    "python": _python,
    "cpp": _cpp,
    "docstrings": _docstrings,
    **{name: partial(_generated, name) for name in generated.names()},
}
