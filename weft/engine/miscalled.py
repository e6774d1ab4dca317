"""What is wrong with the call of a merge, whatever the models hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from weft.engine.method import Method
from weft.engine.registry import get
from weft.engine.run import Step
from weft.error import OptionError, WeftError

Per = Callable[[str], tuple[Step, Sequence[float]]]
"""What a weight, norm or bias of this name is merged by: a step, and a weight for each model."""
Wrong = tuple[str, object, str, str]
"""Where, got, want, fix."""


def asked(per: Per, names: Sequence[str]) -> tuple[dict[str, tuple[Step, Sequence[float]]], list[WeftError]]:
    """What each of these is merged by, and the errors of those that cannot be."""
    made: dict[str, tuple[Step, Sequence[float]]] = {}
    wrong: list[WeftError] = []
    for name in names:
        try:
            made[name] = per(name)
        except WeftError as e:
            wrong.append(e)
    return made, wrong


def misused(method: Method, models: Sequence[nn.Module], bases: Sequence[nn.Module], *, blind: bool) -> list[WeftError]:
    """What is wrong with the call, whatever the models hold."""
    wrong: list[Wrong] = []
    if method.kind != "merge":
        wrong.append(("method", f"a {method.kind} method", "a merge", "weft methods shows kinds"))
    count = method.members
    if not models or (count is not None and len(models) != count):
        want = f"{count} models" if count is not None else "one or more models"
        wrong.append(("models", len(models), want, "give as many"))
    if "base" in method.needs and not bases:
        wrong.append(("base", "no base", "the model that the members were tuned from", "give base"))
    if len(bases) > 1 and ("base" not in method.needs or len(bases) - len(models) not in (0, 1)):
        want = "one for each model" if "base" in method.needs else "one: this merge takes no differences"
        fix = "give one, or as many, or what they are added to and as many"
        wrong.append(("base", f"{len(bases)} for {len(models)} models", want, fix))
    if blind:
        wrong.append(("data", "no data", "texts that the members' inputs are known from", "give data"))
    return [_wrong(method, *what) for what in wrong]


def unfit(method: Method, weights: Sequence[float], count: int) -> list[WeftError]:
    """What is wrong with the weights of so many models."""
    return [_wrong(method, *what) for what in _unfit(method, weights, count)]


def misfit(name: str, step: Step, one: Step, weights: Sequence[float], count: int) -> list[WeftError]:
    """What is wrong with what a site is merged by."""
    wrong = _unfit(get(step.method), weights, count)
    if one.method != step.method:
        wrong.append(("method", one.method, f"{step.method}, as everywhere", "merge twice, each with its own at"))
    wrong += uneven(one, count)
    return [_wrong(get(step.method), f"{where} of {name}", got, want, fix) for where, got, want, fix in wrong]


def uneven(step: Step, count: int) -> list[Wrong]:
    """What is wrong with options that have one value a member, but not as many: where, got, want, fix."""
    held = {k: len(cast("tuple[Any, ...]", v)) for k, v in step.options if isinstance(v, tuple)}
    want, fix = "one for all, or one a model", "give as many"
    return [(k, f"{n} for {count} models", want, fix) for k, n in held.items() if n != count]


def _unfit(method: Method, weights: Sequence[float], count: int) -> list[Wrong]:
    """What is wrong with the weights of so many models: where, got, want, fix."""
    if len(weights) != count:
        return [("weights", f"{len(weights)} for {count} models", "one a model", "give as many, or none")]
    if not all(type(w) in (int, float) and math.isfinite(w) for w in weights):
        return [("weights", weights, "finite numbers", "give others")]
    if not method.signed and count and (min(weights) < 0 or math.fsum(weights) <= 0):
        return [("weights", weights, "0 or more, and not all 0", "task_arithmetic takes negative ones")]
    return []


def _wrong(method: Method, where: str, got: object, want: str, fix: str) -> WeftError:
    return OptionError(f"{method.name} cannot be done so", where=where, got=got, want=want, fix=fix)
