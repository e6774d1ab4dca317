"""mergekit's configurations: what each tensor is merged by, what is refused, and results against another reading of mergekit's formulas.

With mergekit at hand (in this environment, or in that of the Python that MERGEKIT_PYTHON names) results are held to its own.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import build_tiny
from torch import Tensor

import weft
from weft.cli.app import build
from weft.engine.mergekit import RULES, parse
from weft.engine.run import Step
from weft.error import WeftError
from weft.store.yaml import parse_yaml

LAYERS = 4
Config = dict[str, Any]
Tensors = dict[str, Tensor]


def config(text: str) -> Config:
    """A configuration as Python has it."""
    return parse_yaml(text.encode(), "c.yml")


FULL = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters: {weight: 1.0, density: [1, 0.7, 0.1]}
  - model: two
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: base
  - model: three
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: [0.5, 1]
        - filter: q_proj
          value: 0.25
        - {filter: "*", value: 0.2}
parameters: {normalize: true, int8_mask: true, lambda: {filter: norm, value: 2}}
dtype: float16
"""


def test_what_each_tensor_is_merged_by() -> None:
    """Values over the depth, filters in their order, and mergekit's defaults; outside the layers the first of a list counts."""
    plan = parse(config(FULL), "c.yml")
    assert plan.models == ["one", "two", "three"] and plan.base == "base" and plan.dtype == torch.float16 and plan.deep
    assert [n.partition(" ")[0] for n in plan.notes] == ["int8_mask"]
    shape, at = (100, 10), plan.site
    for name, place, density, weights, scale in (
        ("model.embed_tokens.weight", 0, (1.0, 0.5, 0.33), [1.0, 0.0, 0.2], 1.0),
        ("model.layers.0.mlp.up_proj.weight", 1, (1.0, 0.5, 0.33), [1.0, 0.0, 0.5], 1.0),
        ("model.layers.1.self_attn.q_proj.weight", 2, (0.85, 0.5, 0.33), [1.0, 0.225, 0.25], 1.0),
        ("model.layers.4.mlp.up_proj.weight", 5, (0.1, 0.5, 0.33), [1.0, 1.0, 1.0], 1.0),
        ("model.layers.2.input_layernorm.weight", 3, (0.7, 0.5, 0.33), [1.0, 0.5, 0.2], 2.0),
        ("lm_head.weight", 6, (1.0, 0.5, 0.33), [1.0, 0.0, 0.2], 1.0),
    ):
        step, given = at(name, shape, place, 5)
        said = dict(step.options)
        assert step.method == "ties" and said["density"] == pytest.approx(density, abs=1e-12), name
        assert given == pytest.approx(weights, abs=1e-12) and said["scale"] == scale
        assert said["then"] == "ties" and said["rescale"] == "none" and said["outliers"] == 0.0
    assert at("x", (7, 1))[0] == Step.of(
        "ties", density=(1.0, 3 / 7, 2 / 7), rescale="none"
    )  # so many as mergekit keeps


def test_slices_have_values_of_their_own() -> None:
    """Each is as deep as its own layers; what is before them has the first slice's, what is behind the last one's."""
    text = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: b, layer_range: [0, 3]}, {model: a, layer_range: [0, 3]}]
    parameters: {t: [0, 1]}
  - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]
    parameters: {t: [0.2, 0.3, 0.4]}
"""
    plan = parse(config(text), "c.yml")
    shares = [plan.site("w", (1, 4), at, 4)[1] for at in range(6)]
    assert plan.models == ["a", "b"]
    assert [t for _, t in shares] == pytest.approx([0.0, 0.0, 0.5, 1.0, 0.4, 0.2]) and not plan.misfit(4)
    assert "all layers" in str(plan.misfit(5)[0])


@pytest.mark.parametrize("name", RULES)
def test_every_method_has_mergekits_defaults(name: str) -> None:
    """With no more than what it has no default for."""
    rule = RULES[name]
    given = {n: 0.5 for n, p in rule.parameters.items() if not isinstance(p.default, bool | float)}
    count = max(rule.models[0], 1) if rule.models[1] is not None else 3
    held: Config = {"merge_method": name, "models": [{"model": f"m{i}"} for i in range(count)], "parameters": given}
    if rule.base in ("first", "apart"):
        held["base_model"] = "m0" if rule.base == "first" else "base"
    plan = parse(held, "c.yml")
    step, weights = plan.site("w", (8, 8))
    assert len(weights) == count == len(plan.models)
    want: dict[str, tuple[Config, float]] = {
        "linear": ({}, 0.5), "slerp": ({"straight": math.acos(0.9995)}, 0.5), "nuslerp": ({}, 0.5),
        "task_arithmetic": ({"scale": 1.0}, 0.5), "ties": ({"density": 1.0, "then": "ties", "rescale": "none"}, 0.5),
        "dare_ties": ({"drop": 0.0, "then": "agree", "rescale": "size", "scale": 1.0}, 0.5),
        "dare_linear": ({"drop": 0.0, "then": "add", "rescale": "size", "scale": 1.0}, 0.5),
        "breadcrumbs": ({"density": 1.0, "then": "add", "rescale": "none"}, 0.5),
        "breadcrumbs_ties": ({"density": 1.0, "then": "agree", "rescale": "none"}, 0.5),
        "della": ({"density": 1.0, "then": "ties", "rescale": "size"}, 0.5),
        "della_linear": ({"density": 1.0, "then": "add", "rescale": "size"}, 0.5),
        "model_stock": ({"opposed": "away"}, 1.0), "passthrough": ({}, 1.0),
    }  # fmt: skip
    options, weight = want[name]
    own = {k: (v,) * count if k in ("density", "drop") else v for k, v in options.items()}
    more = {
        k: (v,) * count for k, v in (("outliers", 0.0), ("spread", 0.0)) if isinstance(dict(step.options).get(k), tuple)
    }
    assert step == Step.of(step.method, **own, **more) and weights == [weight] * count


def test_trimming_is_mergekits() -> None:
    """How many entries stay, and between which probabilities."""
    base: Config = {"base_model": "b", "models": [{"model": "m", "parameters": {"weight": 2}}]}

    def options(shape: tuple[int, int], **more: Any) -> Config:
        method = more.pop("method")
        step, weights = parse({**base, "merge_method": method, "parameters": more}, "c.yml").site("w", shape)
        return {**dict(step.options), "weights": weights}

    held = options((10, 10), method="breadcrumbs", density=0.555, **{"lambda": 3})
    assert (held["density"], held["outliers"], held["scale"]) == ((0.55,), (0.015,), 3.0)
    assert options((10, 10), method="breadcrumbs", density=0.95, gamma=0.3)["outliers"] == (0.055,)
    assert options((1, 4), method="breadcrumbs", density=0.2)["scale"] == 0.0  # nothing is kept: the base
    held = options((5, 11), method="della", density=0.6, epsilon=0.2)
    assert held["density"] == (0.6,) and held["spread"] == (pytest.approx(0.2 * 11 / 10 / 0.4),)
    assert options((5, 11), method="della_linear", density=0.4, epsilon=0)["spread"] == (1e-9,)
    assert options((5, 11), method="dare_ties", density=0.6)["drop"] == (pytest.approx(0.4),)
    assert options((5, 11), method="dare_linear", density=2.5, normalize=True)["weights"] == [1.0]
    assert options((5, 11), method="task_arithmetic", normalize=True, **{"lambda": 3})["weights"] == [3.0]
    assert options((5, 11), method="dare_ties", weight=0)["weights"] == [2.0]  # the model's own counts


TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
REFUSED = {
    "no method": (TWO, "merge_method"),
    "a strange method": ("merge_method: karcher\n" + TWO, "(?s)karcher.*linear, slerp"),
    "no models": ("merge_method: linear", "neither"),
    "models and slices": ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n" + TWO, "(?s)models and slices"),
    "modules": ("merge_method: linear\nmodules: {}\n" + TWO, "one stack"),
    "a template": ("merge_method: linear\nchat_template: auto\n" + TWO, "tokenizer's"),
    "an unknown key": ("merge_method: linear\nname: x\n" + TWO, "(?s)unknown key.*name"),
    "an unknown parameter": ("merge_method: linear\nparameters: {density: 0.5}\n" + TWO, "(?s)density.*weight, normalize"),
    "a parameter of none": ("merge_method: model_stock\nbase_model: c\n" + TWO, "(?s)weight.*filter_wise"),
    "a shared one of a model": (
        "merge_method: ties\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1, normalize: true}}]",
        "for all models",
    ),
    "no base": ("merge_method: ties\n" + TWO, "goes from it"),
    "a base too much": ("merge_method: nuslerp\nbase_model: c\n" + TWO, "no differences"),
    "a base outside slices": (
        "merge_method: slerp\nbase_model: c\nparameters: {t: 1}\n"
        "slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]",
        "in none of the slices",
    ),
    "three for slerp": (
        "merge_method: slerp\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}",
        "(?s)3.*2, for slerp",
    ),
    "one for model_stock": ("merge_method: model_stock\nbase_model: c\nmodels: [{model: a}]", "1 beside the base"),
    "two to pass": ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "(?s)2.*1, for passthrough"),
    "one twice": ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "every model once"),
    "an adapter": ("merge_method: linear\nmodels: [{model: a+lora}]", "weft attach"),
    "a revision": ("merge_method: linear\nmodels: [{model: a@main}]", "revision"),
    "a model that is no text": ("merge_method: linear\nmodels: [{model: {path: a}}]", "a hub id"),
    "stacked layers": (
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 3]}]}]",
        "no model of other layers",
    ),
    "other layers of each": (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 3]}]}]",
        "the same layers",
    ),
    "no layers": ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]", "layer_range"),
    "a base of a slice": (
        "merge_method: linear\nslices: [{base_model: a, sources: [{model: a, layer_range: [0, 2]}]}]",
        "for the whole file",
    ),
    "an empty list": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: []}", "(?s)t.*a number"),
    "a word": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: half}", "a number"),
    "a mixed list": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [1, {value: 2}]}", "a number"),
    "a number for a switch": ("merge_method: linear\nparameters: {normalize: 1}\n" + TWO, "true or false"),
    "a filter that is none": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [{filter: 1, value: 1}]}",
        "filter",
    ),
    "a misspelt filter": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [{filters: x, value: 1}]}", "filters"),
    "a dtype": ("merge_method: linear\ndtype: float64\n" + TWO, "float32"),
    "an unknown tokenizer": ("merge_method: linear\ntokenizer_source: c\n" + TWO, "union, base or one of a, b"),
    "a tokenizer's tokens": ("merge_method: linear\ntokenizer: {source: a, tokens: {}}\n" + TWO, "same words"),
    "two tokenizers": ("merge_method: linear\ntokenizer_source: a\ntokenizer: {source: a}\n" + TWO, "both"),
    "no table": ("- linear", "no table"),
}  # fmt: skip
THERE = {
    "no value": ("merge_method: linear\nmodels: [{model: a}]", "(?s)w of a.*no weight"),
    "no filter fits": ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: q, value: 1}]}}]", "no weight"),
    "a sum of two": ("merge_method: linear\nparameters: {normalize: false}\n" + TWO, "(?s)normalize.*add up to 2"),
    "beyond": ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 1.5}", "0 to 1"),
    "no density": ("merge_method: ties\nbase_model: c\nparameters: {density: 0}\n" + TWO, "above 0"),
    "too few for dare": ("merge_method: dare_ties\nbase_model: c\nparameters: {density: 0.0001}\n" + TWO, "(?s)w: dare.*0.999"),
    "too wide": ("merge_method: della\nbase_model: c\nparameters: {density: 0.1}\n" + TWO, "epsilon"),
    "a negative share": ("merge_method: breadcrumbs\nbase_model: c\nparameters: {density: 0.1, gamma: -1}\n" + TWO, "gamma"),
    "by rows": ("merge_method: model_stock\nbase_model: c\nparameters: {filter_wise: true}\nmodels: [{model: a}, {model: b}]", "one angle"),
    "not flat": ("merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n" + TWO, "whole weights"),
    "scaled": ("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 2}}]", "no merge"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*REFUSED, *THERE])
def test_what_weft_cannot_do_is_refused(case: str) -> None:
    """By name; some of it shows only where a tensor is."""
    text, said = {**REFUSED, **THERE}[case]
    with pytest.raises(WeftError, match=said):
        plan = parse(config(text), "c.yml")
        assert case in THERE
        plan.site("w", (4, 4))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(WeftError, match=r"(?s)4 problems.*foo.*weigth.*normalize.*float8"):
        text = "merge_method: ties\nbase_model: c\nfoo: 1\ndtype: float8\n"
        text += "models: [{model: a, parameters: {weigth: 1, normalize: true}}]"
        parse(config(text), "c.yml")


def test_nothing_but_a_weft_error_comes_of_junk() -> None:
    """Any part of a configuration may be anything."""
    rng, junk = random.Random(0), [None, 1, -1.5, True, "x", "", [], {}, [[]], [{}], {"a": 1}, ["a", 1]]

    def places(value: Any) -> list[tuple[Any, Any]]:
        here = (
            list(value.items())
            if isinstance(value, dict)
            else list(enumerate(value))
            if isinstance(value, list)
            else []
        )
        return [*((value, k) for k, _ in here), *itertools.chain.from_iterable(places(v) for _, v in here)]

    texts = [FULL, *(t for t, _ in REFUSED.values())]
    for _ in range(2000):
        held = config(rng.choice(texts))
        if found := places(held):
            where, key = rng.choice(found)
            where[key] = rng.choice(junk)
        try:
            plan = parse(held, "c.yml")
            plan.misfit(3)
            plan.site("model.layers.1.mlp.up_proj.weight", (4, 4), 2, 3)
        except WeftError:
            pass


# ------------------------------------------------------------------------------------------------------- another reading


def setting(value: Any, name: str, t: float) -> Any:
    """A parameter where it applies; None where it says nothing."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and isinstance(value[0], dict):
        fits = [c["value"] for c in value if c.get("filter", "*") == "*" or c["filter"] in name]
        return setting(fits[0], name, t) if fits else None
    if not isinstance(value, list):
        return value
    at = t * (len(value) - 1)
    low = math.floor(at)
    return value[low] + (at - low) * (value[min(low + 1, len(value) - 1)] - value[low])


def wanted(c: Config, tensors: dict[str, Tensors], name: str) -> Tensor:
    """mergekit's result for one tensor in float64, by its formulas, of methods that draw nothing."""
    block = re.search(r"layers\.(\d+)\.", name)
    t = int(block[1]) / (LAYERS - 1) if block else 0.0
    sources = c.get("models") or c["slices"][0]["sources"]
    own = {s["model"]: s.get("parameters") or {} for s in sources}
    base = c.get("base_model")
    if base is not None and "models" in c:
        own.setdefault(base, {})

    def of(what: str, default: Any, model: str = "") -> Any:
        found = (setting(p[what], name, t) for p in (own.get(model, {}), c.get("parameters", {})) if what in p)
        return next((v for v in found if v is not None), default)

    x = {m: tensors[m][name].double().flatten() for m in own}
    method, shape = c["merge_method"], tensors[next(iter(own))][name].shape
    if method == "linear":
        w = {m: of("weight", None, m) for m in own}
        made = sum(w[m] * x[m] for m in own) / (sum(w.values()) if of("normalize", True) else 1)
    elif method in ("slerp", "nuslerp"):
        (one, a), (two, b) = sorted(x.items(), key=lambda item: item[0] != base)
        w = of("weight", 0, one), of("weight", 0, two)
        share = of("t", None) if method == "slerp" else w[1] / (w[0] + w[1])
        angle = math.acos(float(a @ b / a.norm() / b.norm()))
        straight = method == "slerp" and abs(math.cos(angle)) > 0.9995
        made = (1 - share) * a + share * b
        if not straight:
            made = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    elif method == "model_stock":
        d = [x[m] - x[base] for m in own if m != base]
        cos = [float(a @ b / a.norm() / b.norm()) for a, b in itertools.combinations(d, 2)]
        c_, k = sum(cos) / len(cos), len(d)
        made = x[base] + k * c_ / (1 + (k - 1) * c_) * sum(d) / k
    else:
        members = [m for m in own if m != base]
        w = [of("weight", None, m) for m in members]
        d = [
            of("weight", None, m)
            * trim(method, x[m] - x[base], of("density", 1.0, m), of("gamma", 0.01, m), of("rescale", False))
            for m in members
        ]
        total, mask = sum(d), [torch.ones_like(d[0]) for _ in d]
        if method.endswith("ties"):
            mask = [
                v.sign() == torch.where(total > 0, 1.0, torch.where(total < 0, -1.0, 2.0)) for v in d
            ]  # even: weft's rule
        made = sum(v * k for v, k in zip(d, mask, strict=True))
        if of("normalize", method == "ties"):
            made = made / sum(a * k for a, k in zip(w, mask, strict=True)).masked_fill_(
                sum(a * k for a, k in zip(w, mask, strict=True)) == 0, 1
            )
        made = x[base] + of("lambda", 1.0) * made
    return made.view(shape)


def trim(method: str, d: Tensor, density: float, gamma: float, rescale: bool) -> Tensor:
    """A task vector's entries that stay."""
    n, order = d.numel(), d.abs().argsort()
    kept = torch.zeros_like(d)
    if method == "task_arithmetic" or density >= 1:
        return d
    if method == "ties":
        at = order[n - max(1, int(density * n)) :]
    else:
        least = max(0, n - int(density * n) - int(gamma * n))
        at = order[least : least + int(density * n)]
    kept[at] = d[at]
    return kept * d.abs().sum() / kept.abs().sum() if rescale and kept.any() else kept


THREE = """
models:
  - model: one
    parameters: {weight: 1.0, density: [1, 0.7, 0.1]}
  - model: two
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: three
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0.2}]}
base_model: base
"""
PAIR = "models: [{model: one, parameters: {weight: 0.5}}, {model: two, parameters: {weight: [0.3, 0.9]}}]\n"
SLERP = """
merge_method: slerp
slices: [{sources: [{model: one, layer_range: [0, 4]}, {model: base, layer_range: [0, 4]}]}]
base_model: base
parameters: {t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]}
"""
EXACT = {
    "linear": "merge_method: linear\n" + PAIR,
    "linear of a base": "merge_method: linear\nbase_model: base\nparameters: {weight: [0.1, 0.2]}\n" + PAIR,
    "linear as it is": "merge_method: linear\nparameters: {normalize: false}\n"
    "models: [{model: one, parameters: {weight: [0, 1]}}, {model: two, parameters: {weight: [1, 0]}}]",
    "slerp": SLERP,
    "nuslerp": "merge_method: nuslerp\n" + PAIR,
    "task_arithmetic": "merge_method: task_arithmetic\nparameters: {lambda: 0.8}" + THREE,
    "task_arithmetic in the mean": "merge_method: task_arithmetic\nparameters: {normalize: true}" + THREE,
    "ties": "merge_method: ties\nparameters: {int8_mask: true}" + THREE,
    "ties in the sum": "merge_method: ties\nparameters: {normalize: false, rescale: true, lambda: 1.5}" + THREE,
    "breadcrumbs": "merge_method: breadcrumbs\nparameters: {gamma: 0.05}" + THREE,
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nparameters: {normalize: true}" + THREE,
    "model_stock": "merge_method: model_stock\nmodels: [{model: one}, {model: two}, {model: three}]\nbase_model: base",
    "passthrough": "merge_method: passthrough\nmodels: [{model: one}]",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models near it, in float32 and in bfloat16."""
    place = tmp_path_factory.mktemp("models")
    for dtype, folder in ((torch.float32, "f"), (torch.bfloat16, "b")):
        for i, name in enumerate(("base", "one", "two", "three")):
            model = build_tiny("llama", layers=LAYERS)
            g = torch.Generator().manual_seed(i)
            for p in model.parameters() if i else ():
                p.data += 0.01 * torch.randn(p.shape, generator=g)
            model.to(dtype).save_pretrained(place / folder / name)
    return place


def tensors(place: Path) -> dict[str, Tensors]:
    """Every model's, by its name."""
    return {n: load_file(place / n / "model.safetensors") for n in ("base", "one", "two", "three")}


def merged(text: str, tmp_path: Path, **how: Any) -> Tensors:
    """What a merge saves."""
    (tmp_path / "c.yml").write_text(text)
    weft.merge_config(tmp_path / "c.yml", tmp_path / "out", replace=True, **how)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("case", EXACT)
def test_results_are_mergekits_formulas(
    case: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor by tensor, in float32 and rounded once to bfloat16; paths are from the working folder on."""
    monkeypatch.chdir(folders / "f")
    held, c = tensors(Path()), config(EXACT[case])
    for dtype in (torch.float32, torch.bfloat16):
        made = merged(f"{EXACT[case]}\ndtype: {str(dtype).removeprefix('torch.')}", tmp_path)
        if case == "passthrough":
            assert all(torch.equal(made[n], t.to(dtype)) for n, t in held["one"].items())
            continue
        assert made.keys() == held["one"].keys()
        for name, t in made.items():
            want = wanted(c, held, name)
            eps = torch.finfo(dtype).eps / 2 + 4e-7
            assert t.dtype == dtype or name.endswith("norm.weight")
            torch.testing.assert_close(t.double(), want, rtol=eps, atol=1e-7 * float(want.abs().max()), msg=name)
    assert weft.load(tmp_path / "out").config.dtype == torch.bfloat16
    assert (tmp_path / "out" / "mergekit_config.yml").read_text().startswith(EXACT[case])


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "della_linear"])
def test_what_is_drawn_has_mergekits_odds(
    method: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one member: as many stay, as large in all as before; of DELLA, by rank from density - epsilon to density + epsilon."""
    monkeypatch.chdir(folders / "f")
    held = tensors(Path())
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: one}}]\nparameters: {{weight: 1, density: 0.6"
    text += ", epsilon: 0.3}" if "della" in method else "}"
    low, high, count = 0, 0, 0
    for seed in range(5):
        made = merged(text, tmp_path, seed=seed)
        for name in (n for n in made if "proj" in n):
            d, kept = ((t[name] - held["base"][name]).double() for t in (held["one"], made))
            stays = kept.abs() > 1e-6
            assert float(kept.abs().sum()) == pytest.approx(float(d.abs().sum()), rel=1e-3)
            ratio = (kept / d)[stays]
            torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=0.02, atol=0.0)
            rank = d.abs().argsort(1).argsort(1) / (d.shape[1] - 1)
            low, high, count = (
                low + int(stays[rank < 0.25].sum()),
                high + int(stays[rank > 0.75].sum()),
                count + int((rank > 0.75).sum()),
            )
    wide = 0.3 * 0.75 if "della" in method else 0.0  # in the outer quarters, on average
    assert low / count == pytest.approx(0.6 - wide, abs=0.02) and high / count == pytest.approx(0.6 + wide, abs=0.02)


def test_the_command(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mergekit-yaml's; what changes nothing is said; nothing is overwritten, and no source is."""
    from typer.testing import CliRunner

    monkeypatch.chdir(folders / "b")
    (tmp_path / "c.yml").write_text(EXACT["ties"])

    def run(*argv: str) -> Any:
        return CliRunner().invoke(build(["mergekit"]), ["mergekit", *argv], catch_exceptions=False)

    done = run(str(tmp_path / "c.yml"), str(tmp_path / "out"))
    assert done.exit_code == 0 and "int8_mask changes nothing" in done.stderr and "saved in" in done.stdout
    assert run(str(tmp_path / "c.yml"), str(tmp_path / "out")).exit_code == 4
    assert run(str(tmp_path / "c.yml"), "three", "--replace").exit_code == 4
    (tmp_path / "c.yml").write_text("merge_method: sce")
    bad = run(str(tmp_path / "c.yml"), str(tmp_path / "other"))
    assert bad.exit_code == 2 and "sce" in bad.stderr and not (tmp_path / "other").exists()
    (tmp_path / "c.yml").write_text(SLERP.replace("[0, 4]", "[0, 3]"))
    assert "0 to 4" in run(str(tmp_path / "c.yml"), str(tmp_path / "other")).stderr


def test_the_tokenizer_is_the_one_that_is_named(folders: Path, tmp_path: Path, words: Any) -> None:
    """Of models with one vocabulary; without a name the base's, or the first model's. Other vocabularies are refused."""
    for name in ("one", "two"):
        shutil.copytree(folders / "f" / name, tmp_path / name)
        held = copy.deepcopy(words)
        held.chat_template = f"{{{{ '{name}' }}}}"
        held.save_pretrained(tmp_path / name)
    models = str([{"model": str(tmp_path / name)} for name in ("one", "two")])
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: {models}\n"
    for more, name in (
        ("", "one"),
        (f"tokenizer_source: {tmp_path / 'two'}", "two"),
        ("tokenizer: {source: union}", "one"),
    ):
        merged(text + more, tmp_path)
        assert name in weft.tokenizer(weft.load(tmp_path / "out")).chat_template
    held.add_tokens(["another"])
    held.save_pretrained(tmp_path / "two")
    with pytest.raises(WeftError, match="other tokenizers"):
        merged(text, tmp_path)


def test_models_of_other_dtypes_are_stored_in_the_wider_one(folders: Path, tmp_path: Path) -> None:
    """As mergekit does where a configuration names none."""
    one, two = folders / "f" / "one", folders / "b" / "two"
    for order in ((one, two), (two, one)):
        text = "merge_method: linear\nparameters: {weight: 1}\nmodels: " + str([{"model": str(m)} for m in order])
        made = merged(text, tmp_path)
        assert {t.dtype for n, t in made.items() if "norm" not in n} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- mergekit itself

MERGE = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
how = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
for name, text in yaml.safe_load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), sys.argv[2] + "/" + name, how)
"""


def peer() -> str | None:
    """The Python that has mergekit."""
    return os.environ.get("MERGEKIT_PYTHON") or (sys.executable if importlib.util.find_spec("mergekit") else None)


def test_results_are_mergekits(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values but for roundings in float32; in bfloat16, but for what mergekit rounds on the way, of linear and slerp."""
    python = peer()
    if python is None:
        pytest.skip("mergekit is not installed; MERGEKIT_PYTHON may name the Python of an environment that has it")
    for folder, dtype in (("f", torch.float32), ("b", torch.bfloat16)):
        monkeypatch.chdir(folders / folder)
        cases = {
            n: f"{t}\ndtype: {str(dtype)[6:]}" for n, t in EXACT.items() if folder == "f" or n in ("linear", "slerp")
        }
        (tmp_path / "cases.yml").write_text(yaml.safe_dump(cases))
        theirs = tmp_path / f"theirs-{folder}"
        subprocess.run(
            [python, "-c", MERGE, str(tmp_path / "cases.yml"), str(theirs)],
            check=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        for case, text in cases.items():
            ours, want = merged(text, tmp_path), load_file(theirs / case / "model.safetensors")
            assert ours.keys() == want.keys()
            for name, t in want.items():
                eps = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(
                    ours[name].double(), t.double(), rtol=eps, atol=4e-7 * float(t.abs().max()), msg=f"{case}: {name}"
                )
