"""What mergekit's methods are in weft: their parameters with mergekit's defaults, and the step and weights that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.engine.run import Step
from weft.error import OptionError

Scope = Literal["shared", "inputs", "members"]
"""Whether a parameter is one for all, of every model, or of every model but the base."""
Base = Literal["a model", "first", "apart", "none"]
"""What a base is: a member like the others; the first one, which must be there; what members are compared with; or refused."""
Values = Mapping[str, Any]
ASKED = object()
"""No default: a configuration must say it."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of one of mergekit's methods."""

    kind: type[float] | type[bool]
    scope: Scope
    default: Any = ASKED


@dataclass(frozen=True)
class Rule:
    """One of mergekit's methods: what it may be told, and how a weight is merged by it.

    `made` has the method's shared parameters, those of every member, and the shape of the weight; it gives options and weights.
    """

    method: str
    parameters: Mapping[str, Parameter]
    base: Base
    made: Callable[[Values, Sequence[Values], tuple[int, int]], tuple[dict[str, Any], list[float]]]
    models: tuple[int, int | None] = (1, None)
    """The fewest and the most members."""
    idle: tuple[str, ...] = ()
    """Parameters that change nothing."""

    def step(self, shared: Values, each: Sequence[Values], shape: tuple[int, int]) -> tuple[Step, list[float]]:
        """What a weight of this shape is merged by. Errors: OptionError."""
        options, weights = self.made(shared, each, shape)
        return Step.of(self.method, **options), weights


def _linear(shared: Values, each: Sequence[Values], _: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    weights = [v["weight"] for v in each]
    if not shared["normalize"] and abs(math.fsum(weights) - 1) > 1e-9:
        _refuse("normalize", f"false, and weights that add up to {math.fsum(weights):.6g}", "weights that add up to 1")
    return {}, weights


def _slerp(shared: Values, each: Sequence[Values], _: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    t = shared["t"]
    if not 0 <= t <= 1:
        _refuse("t", t, "0 to 1: from the base to the other model")
    return {"straight": math.acos(0.9995)}, [1 - t, t]


def _nuslerp(shared: Values, each: Sequence[Values], _: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    if not shared["nuslerp_flatten"]:
        _refuse("nuslerp_flatten", False, "true: weft goes along the arc of whole weights")
    weights = [v["weight"] for v in each]
    return {}, weights if abs(sum(weights)) >= 1e-6 else [1.0, 1.0]


def _stock(shared: Values, each: Sequence[Values], _: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    if shared["filter_wise"]:
        _refuse("filter_wise", True, "false: weft takes one angle a weight")
    return {"opposed": "away"}, [1.0] * len(each)


def _passed(_: Values, each: Sequence[Values], __: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
    if each[0]["scale"] != 1:
        _refuse("scale", each[0]["scale"], "1: a scaled model is no merge")
    return {}, [1.0]


Trim = Callable[[Values, tuple[int, int]], tuple[dict[str, float], bool]]
"""What one member's task vector is trimmed by, the options of weft's method that are its own; and whether anything is left."""


def _task_vectors(elect: bool, trim: Trim | None) -> Callable[..., tuple[dict[str, Any], list[float]]]:
    """A member of mergekit's family of eight: task vectors are trimmed, may be scaled up again, and are added or elect a sign."""

    def made(shared: Values, each: Sequence[Values], shape: tuple[int, int]) -> tuple[dict[str, Any], list[float]]:
        weights, scale = [v["weight"] for v in each], shared["lambda"]
        whole = math.fsum(weights)
        if shared["normalize"] and not elect and abs(whole) >= 1e-8:
            weights = [w / whole for w in weights]
        if trim is None:
            return {"scale": 1.0}, [scale * w for w in weights]
        for v in each:
            if v["density"] <= 0:
                _refuse("density", v["density"], "above 0; a weight of 0 leaves a model out")
        parts = [trim(v, shape) for v in each]
        weights = [w if left else 0.0 for w, (_, left) in zip(weights, parts, strict=True)]
        if not any(weights):
            weights, scale = [1.0] * len(each), 0.0  # nothing is added: the base
        own = {n: tuple(options[n] for options, _ in parts) for n in parts[0][0]}
        then = ("ties" if shared["normalize"] else "agree") if elect else "add"
        return {**own, "rescale": "size" if shared["rescale"] else "none", "then": then, "scale": scale}, weights

    return made


def _largest(v: Values, shape: tuple[int, int]) -> tuple[dict[str, float], bool]:
    """So many as mergekit keeps, which rounds down."""
    size = math.prod(shape)
    return {"density": max(1, int(v["density"] * size)) / size if v["density"] < 1 else 1.0}, True


def _any(v: Values, _: tuple[int, int]) -> tuple[dict[str, float], bool]:
    """Each with the same probability."""
    return {"drop": max(0.0, 1 - v["density"])}, True


def _inliers(v: Values, shape: tuple[int, int]) -> tuple[dict[str, float], bool]:
    """The largest but for outliers, of which fewer go where the rest would be less than the density."""
    size = math.prod(shape)
    if v["density"] >= 1:
        return {"density": 1.0, "outliers": 0.0}, True
    if v["gamma"] < 0:
        _refuse("gamma", v["gamma"], "0 or more")
    keep = int(v["density"] * size)
    top = min(int(v["gamma"] * size), size - keep)
    return {"density": max(1, keep) / size, "outliers": (top + 0.5) / size if 0 < top < size else 0.0}, keep > 0


def _ranked(v: Values, shape: tuple[int, int]) -> tuple[dict[str, float], bool]:
    """By rank: from density - epsilon for the smallest entry of a row to density + epsilon for the largest."""
    density, epsilon = v["density"], v["epsilon"]
    if density >= 1:
        return {"density": 1.0, "spread": 0.0}, True
    room, n = min(density, 1 - density), shape[1]
    if not 0 <= epsilon < room:
        _refuse("epsilon", epsilon, f"0 or more, and below {room:.4g}: density ± epsilon lies between 0 and 1")
    return {"density": density, "spread": min(1.0, max(1e-9, epsilon * n / max(1, n - 1) / room))}, True


def _refuse(where: str, got: object, want: str) -> None:
    raise OptionError("weft cannot merge so", where=where, got=got, want=want, fix="change it, or merge with mergekit")


_WEIGHT = {"weight": Parameter(float, "inputs")}
_OF_MEMBERS = {"weight": Parameter(float, "members")}


def _family(method: str, elect: bool, normalize: bool, rescale: bool, trim: Trim | None, **more: float) -> Rule:
    shared = {"normalize": normalize, "rescale": rescale, "int8_mask": False}
    parameters = {
        **{n: Parameter(bool, "shared", v) for n, v in shared.items()},
        "lambda": Parameter(float, "shared", 1.0),
        **_OF_MEMBERS,
        "density": Parameter(float, "members", 1.0),
        **{n: Parameter(float, "members", v) for n, v in more.items()},
    }
    idle = ("int8_mask",) if trim is not None else ("int8_mask", "rescale", "density")
    return Rule(method, parameters, "apart", _task_vectors(elect, trim), idle=idle)


RULES: dict[str, Rule] = {
    "linear": Rule("soup", {**_WEIGHT, "normalize": Parameter(bool, "shared", True)}, "a model", _linear),
    "slerp": Rule("slerp", {"t": Parameter(float, "shared")}, "first", _slerp, (2, 2)),
    "nuslerp": Rule(
        "slerp",
        {
            **_OF_MEMBERS,
            "nuslerp_flatten": Parameter(bool, "shared", True),
            "nuslerp_row_wise": Parameter(bool, "shared", False),
        },
        "none",
        _nuslerp,
        (2, 2),
        ("nuslerp_row_wise",),
    ),
    "task_arithmetic": _family("task_arithmetic", False, False, False, None),
    "ties": _family("ties", True, True, False, _largest),
    "dare_ties": _family("dare", True, False, True, _any),
    "dare_linear": _family("dare", False, False, True, _any),
    "breadcrumbs": _family("ties", False, False, False, _inliers, gamma=0.01),
    "breadcrumbs_ties": _family("ties", True, False, False, _inliers, gamma=0.01),
    "della": _family("ties", True, True, True, _ranked, epsilon=0.15),
    "della_linear": _family("ties", False, False, True, _ranked, epsilon=0.15),
    "model_stock": Rule("model_stock", {"filter_wise": Parameter(bool, "shared", False)}, "apart", _stock, (2, None)),
    "passthrough": Rule("soup", {"scale": Parameter(float, "inputs", 1.0)}, "a model", _passed, (1, 1)),
}
"""By mergekit's names."""
