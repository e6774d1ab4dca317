"""mergekit's configurations: a file that says what models are merged, by which method, with which parameters.

    merge_method: ties
    base_model: BASE
    models:
      - model: ONE
        parameters: {weight: 1.0, density: [1, 0.7, 0.1]}
      - model: OTHER
        parameters: {density: 0.5, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
    parameters: {normalize: true}
    dtype: bfloat16

A parameter is a number (or true, false), a list of them over the depth of the model, or a list of values for tensors whose name has a
text in it. What the file does not say has mergekit's default. It is merged as mergekit merges it, or refused: for methods that weft has
not, models put together from layers of others, and any key that mergekit would not look at, all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from weft.engine.mergekit.plan import Plan, Setting, Slice, Table, Value
from weft.engine.mergekit.rules import RULES, Parameter, Rule
from weft.error import FormatError, OptionError, WeftError, raise_all
from weft.store.yaml import read_yaml

DTYPES = {n: getattr(torch, n) for n in ("bfloat16", "float16", "float32")}


def read(path: Path) -> Plan:
    """The plan of a file. Errors: PathError; FormatError, OptionError with every problem found."""
    return parse(read_yaml(path), path.name)


def parse(value: Any, where: str) -> Plan:
    """The plan that a parsed file stands for. Errors: FormatError, OptionError with every problem found."""
    return _Reader(where).plan(value)


_KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
)  # fmt: skip
_NOT_HERE = {
    "modules": "models or slices: weft merges models of one stack",
    "chat_template": "none: the template is the tokenizer's",
    "residual_weight": "none",
    "base_model": "one base_model, for the whole file",
    "tokens": "none: all models have the same words",
    "pad_to_multiple_of": "none: embeddings keep their rows",
}
"""What mergekit knows and weft does not, and what there may be instead."""


class _Reader:
    """Reads a configuration, and gathers what is wrong with it."""

    def __init__(self, where: str) -> None:
        self.where, self.problems, self.notes = where, list[WeftError](), list[str]()
        self.rule: Rule | None = None
        self.name = ""

    def plan(self, value: Any) -> Plan:
        """The plan. Errors: FormatError, OptionError with every problem found."""
        held = self.table(value, self.where, _KEYS)
        name = held.get("merge_method")
        self.rule, self.name = RULES.get(name) if isinstance(name, str) else None, str(name)
        if self.rule is None:
            self.refuse(
                "merge_method", name, f"one of {', '.join(RULES)}", "merge with mergekit, or by a method of weft's own"
            )
        base = None if held.get("base_model") is None else self.model(held["base_model"], "base_model")
        common = self.settings(held.get("parameters"), "parameters")
        both = [k for k in ("models", "slices") if held.get(k)]
        if len(both) != 1:
            self.refuse("models, slices", " and ".join(both) or "neither", "one of them", "write the models once")
        slices = (
            self.slices(held["slices"]) if both == ["slices"] else [Slice(self.models(held.get("models"), "models"))]
        )
        plan = Plan(
            self.where, self.rule or RULES["linear"], self.name, tuple(self.completed(s, base, both) for s in slices), common, base,
            self.dtype(held), self.tokenizer(held, base, slices), tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip
        if self.rule is not None:
            self.counted(plan)
        raise_all(self.problems)
        return plan

    def refuse(self, at: str, got: object, want: str, fix: str, what: str = "weft cannot merge so") -> None:
        """Note a problem of what the file asks for."""
        self.problems.append(OptionError(what, where=f"{self.where}: {at}", got=got, want=want, fix=fix))

    def table(self, value: Any, at: str, keys: Sequence[str]) -> dict[str, Any]:
        """A table without other keys than these."""
        if not isinstance(value, dict):
            want, fix = f"a table of {', '.join(keys)}", "write it as mergekit's documents do"
            what = "a part of a configuration is no table"
            self.problems.append(FormatError(what, where=at, got=type(value).__name__, want=want, fix=fix))
            return {}
        held = cast("dict[str, Any]", value)
        for key in [k for k in held if k not in keys]:
            if key in _NOT_HERE:
                self.refuse(f"{at}: {key}" if at != self.where else key, key, _NOT_HERE[key], "merge with mergekit")
                continue
            what, fix = "a configuration has an unknown key", "correct or remove it: mergekit does not look at it"
            self.problems.append(FormatError(what, where=at, got=key, want=", ".join(keys), fix=fix))
        return held

    def items(self, value: Any, at: str) -> list[Any]:
        """A list of one or more."""
        if isinstance(value, list) and value:
            return cast("list[Any]", value)
        what, fix = "a part of a configuration is no list", "write it as mergekit's documents do"
        self.problems.append(
            FormatError(what, where=f"{self.where}: {at}", got=value, want="a list of one or more", fix=fix)
        )
        return []

    def model(self, value: Any, at: str) -> str:
        """A folder or hub id."""
        if not isinstance(value, str) or not value:
            self.refuse(at, value, "a folder or a hub id", "write it as text")
        elif "+" in value:
            fix = "weft attach MODEL ADAPTER --out FOLDER, then name that folder"
            self.refuse(at, value, "a model without an adapter", fix)
        elif "@" in value:
            self.refuse(
                at, value, "a folder or a hub id, without a revision", "download that revision, and name its folder"
            )
        return str(value)

    def models(self, value: Any, at: str, *more: str) -> dict[str, Table]:
        """Every model of a list with its parameters."""
        made: dict[str, Table] = {}
        for i, item in enumerate(self.items(value, at), 1):
            place = f"{at}, model {i}"
            held = self.table(item, f"{self.where}: {place}", ("model", "parameters", *more))
            name = self.model(held.get("model"), place)
            if name in made:
                self.refuse(place, name, "every model once", "add up its weights")
            made[name] = self.settings(held.get("parameters"), f"{place}: parameters", name)
        return made

    def slices(self, value: Any) -> list[Slice]:
        """Slices whose sources are the same layers of the same models."""
        made: list[Slice] = []
        for i, item in enumerate(self.items(value, "slices"), 1):
            place = f"slices, slice {i}"
            held = self.table(item, f"{self.where}: {place}", ("sources", "parameters"))
            sources = held.get("sources")
            models = self.models(sources, f"{place}: sources", "layer_range")
            ranges = [s.get("layer_range") for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
            layers = self.layers(ranges, place)
            if made and made[0].models.keys() != models.keys():
                self.refuse(
                    place, ", ".join(models), ", ".join(made[0].models), "merge the same models everywhere", _STACKED
                )
            made.append(Slice(models, self.settings(held.get("parameters"), f"{place}: parameters"), layers))
        return made or [Slice({})]

    def layers(self, ranges: Sequence[Any], at: str) -> tuple[int, int]:
        """The one range of a slice's sources."""
        for one in ranges:
            if not (
                isinstance(one, list) and len(one) == 2 and all(type(n) is int for n in one) and 0 <= one[0] < one[1]
            ):
                self.refuse(f"{at}: layer_range", one, "[first, one behind the last]", "give two numbers")
                return 0, 1
        if any(one != ranges[0] for one in ranges):
            self.refuse(
                f"{at}: layer_range", ranges, "the same layers of every source", "stack layers with mergekit", _STACKED
            )
        return (ranges[0][0], ranges[0][1]) if ranges else (0, 1)

    def settings(self, value: Any, at: str, model: str = "") -> Table:
        """The parameters at one place of the file, of one model or of all."""
        if value is None or self.rule is None:
            return {}
        known = self.rule.parameters
        held = self.table(value, f"{self.where}: {at}", tuple(known) or ("no parameters",))
        for key in [k for k in held if k in known]:
            if model and known[key].scope == "shared":
                fix = "move it to the parameters of the whole file"
                self.refuse(f"{at}: {key}", held[key], "one for all models: mergekit does not look at it here", fix)
            if key in self.rule.idle:
                self.notes.append(f"{key} changes nothing: {_IDLE.get(key, f'{self.name} does not use it')}")
        made = {k: self.setting(held[k], known[k], f"{at}: {k}") for k in held if k in known}
        return {k: v for k, v in made.items() if v is not None}

    def setting(self, value: Any, p: Parameter, at: str) -> Setting | None:
        """A value, a list of values, or values by filters."""
        cases: Any = value if isinstance(value, list) and value and all(isinstance(v, dict) for v in value) else None
        cases = [value] if isinstance(value, dict) else cases
        if cases is None:
            made = self.values(value, p, at)
            return None if made is None else Setting((("", made),))
        found: list[tuple[str, tuple[Value, ...]]] = []
        for case in cases:
            held = self.table(case, f"{self.where}: {at}", ("filter", "value"))
            text, values = held.get("filter"), self.values(held.get("value"), p, f"{at}: value")
            if not isinstance(text, str | None):
                self.refuse(f"{at}: filter", text, "a part of tensors' names", "write it as text")
            elif values is not None:
                found.append(("" if text in (None, "*") else text, values))
        return Setting(tuple(found))

    def values(self, value: Any, p: Parameter, at: str) -> tuple[Value, ...] | None:
        """One value, or several over the depth."""
        listed = cast("list[Any]", value if isinstance(value, list) else [value])
        kinds = (bool,) if p.kind is bool else (int, float)
        if listed and all(type(v) in kinds for v in listed):
            return tuple(p.kind(v) for v in listed)
        want = "true or false" if p.kind is bool else "a number"
        self.refuse(at, value, f"{want}, a list of them, or a list of {{filter, value}}", "correct the value")
        return None

    def completed(self, s: Slice, base: str | None, both: Sequence[str]) -> Slice:
        """The slice with the base among its models, as mergekit adds it to a list of models."""
        if base is None or self.rule is None:
            return s
        if s.models.get(base) and self.rule.base == "apart":
            self.notes.append(f"parameters of the base change nothing: {base}")
        return Slice({**s.models, base: {}}) if base not in s.models and both == ["models"] else s

    def counted(self, plan: Plan) -> None:
        """Note a base that is missing or too much, and too few or too many models."""
        (least, most), kind = plan.rule.models, plan.rule.base
        if kind in ("first", "apart") and (plan.base is None or plan.base not in plan.slices[0].models):
            got = "no base_model" if plan.base is None else f"{plan.base} in none of the slices' sources"
            self.refuse("base_model", got, f"one: {self.name} goes from it", "add it")
        elif kind == "none" and plan.base is not None:
            self.refuse(
                "base_model", plan.base, f"none: weft's {plan.rule.method} takes no differences", "leave it out"
            )
        elif len(plan.models) < least or (most is not None and len(plan.models) > most):
            want = f"{least}" if least == most else f"{least} or more"
            beside = " beside the base" if kind == "apart" else ""
            self.refuse("models", f"{len(plan.models)}{beside}", f"{want}{beside}, for {self.name}", "name as many")

    def dtype(self, held: Mapping[str, Any]) -> torch.dtype | None:
        """What the result is stored in: `out_dtype`, or `dtype`."""
        made: list[torch.dtype] = []
        for key in ("out_dtype", "dtype"):
            said = held.get(key)
            word = said.removeprefix("torch.") if isinstance(said, str) else ""
            if word in DTYPES:
                made.append(DTYPES[word])
            elif said is not None:
                self.refuse(key, said, ", ".join(DTYPES), "weft adds up in float32, whatever the result is stored in")
        return made[0] if made else None

    def tokenizer(self, held: Mapping[str, Any], base: str | None, slices: Sequence[Slice]) -> str | None:
        """The model whose tokenizer the result has: all must have the same words, so that a union is any of them."""
        said, at = held.get("tokenizer_source"), "tokenizer_source"
        if (table := held.get("tokenizer")) is not None:
            if said is not None:
                self.refuse("tokenizer, tokenizer_source", "both", "one of them", "write it once")
            said, at = (
                self.table(table, f"{self.where}: tokenizer", ("source",)).get("source", "union"),
                "tokenizer: source",
            )
        known = [*slices[0].models, *([base] if base is not None else [])]
        if said is None or said == "union":
            return None
        if said == "base" and base is not None:
            return base
        if said not in known:
            self.refuse(at, said, f"union, base or one of {', '.join(known)}", "name a model of the file")
        return str(said)


_STACKED = "weft makes no model of other layers"
_IDLE = {"int8_mask": "masks take a byte here at most", "nuslerp_row_wise": "weights are taken whole"}
