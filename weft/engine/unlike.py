"""What keeps models from being merged or compared: other classes, configurations, weights, shapes, ties, buffers; what is no weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, ShapeError, WeftError
from weft.expr import valueless
from weft.model import Place, branches, expressions, places, plain_tensors, taps
from weft.store.library import config_of


def refusals(models: Mapping[str, nn.Module], act: str = "merged") -> list[WeftError]:
    """Every reason why these models, by what errors call them, cannot be merged, or what `act` says; all are compared with the first.

    ConflictError for another class or configuration, for weights without a value, taps, branches, and what is tied otherwise; ShapeError
    for weights that another model lacks or has in another shape, and for buffers that differ.
    """
    (first, lead), *others = models.items()
    problems = [p for label, m in ((first, lead), *others) for p in _unmergeable(label, m, act)]
    for label, model in others:
        problems += _strange(label, model, first, lead) or [
            *_differing(_sites(lead), _sites(model), first, label),
            *_differing(_plain(lead), _plain(model), first, label),
            *_unequal(lead, model, first, label, act),
        ]
    return problems


def _unmergeable(label: str, model: nn.Module, act: str) -> Iterator[WeftError]:
    yield from valueless({f"{label}: {n}": e for n, e in expressions(model).items()})
    for name, tap in taps(model).items():
        want, fix = "weights of the plain inputs", "weft.untap(model) first"
        what = f"a weight behind a tap is not {act}"
        yield ConflictError(what, where=f"{label}: {name}", got=tap.describe(), want=want, fix=fix)
    for branch in branches(model):
        want, fix = "weights alone", "weft.unbranch(model) first"
        what = f"a branch is not {act}"
        yield ConflictError(what, where=f"{label}: {branch.key}", got=branch.describe(), want=want, fix=fix)


def _strange(label: str, model: nn.Module, first: str, lead: nn.Module) -> list[WeftError]:
    """Another class, or other entries of the configuration than those that say nothing of the weights."""
    if type(model).__name__ != type(lead).__name__:
        got, want = f"{label} is {type(model).__name__}", f"{type(lead).__name__}, as {first}"
        what, fix = "these models are not of one family", "take models that were tuned from one"
        return [ConflictError(what, where="class", got=got, want=want, fix=fix)]
    mine, theirs = _entries(model), _entries(lead)
    return [
        ConflictError(
            "these models are configured otherwise",
            where=f"config: {key}",
            got=f"{label}: {mine.get(key, 'nothing')}",
            want=f"{theirs.get(key, 'nothing')}, as {first}",
            fix="take models that were tuned from one",
        )
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


_SILENT = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "quantization_config",
)
"""Entries of a configuration that say nothing of what weights mean; so do token ids and dropouts."""


def _entries(model: nn.Module) -> dict[str, Any]:
    """The entries of a configuration that weights depend on, nested ones by their path."""
    return dict(_flat(config_of(model))) if hasattr(model, "config") else {}


def _flat(said: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{under}{key}.")
        elif key not in _SILENT and not key.endswith(("_token_id", "_diffusers_version")) and "dropout" not in key:
            yield f"{under}{key}", value


def _sites(model: nn.Module) -> dict[str, str]:
    """What must be the same of every site."""
    return {name: _form(place) for name, place in places(model).items()}


def _form(place: Place) -> str:
    tied = f", tied with {', '.join(place.modules[1:])}" if place.modules[1:] else ""
    return f"{place.kind} {list(place.shape)}{tied}"


def _plain(model: nn.Module) -> dict[str, str]:
    """What must be the same of every tensor that belongs to no expression."""
    return {n: f"{'parameter' if _is_free(t) else 'buffer'} {list(t.shape)}" for n, t in plain_tensors(model).items()}


def _is_free(t: Tensor) -> bool:
    return isinstance(t, nn.Parameter) and t.is_floating_point()


def _differing(ours: Mapping[str, str], theirs: Mapping[str, str], first: str, label: str) -> list[WeftError]:
    what, fix = "these models have other weights", "take models that were tuned from one"
    return [
        ShapeError(
            what,
            where=name,
            got=f"{label}: {theirs.get(name, 'nothing')}",
            want=f"{ours.get(name, 'nothing')}, as {first}",
            fix=fix,
        )
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _unequal(lead: nn.Module, model: nn.Module, first: str, label: str, act: str) -> list[WeftError]:
    """Buffers, and what is not of floating point, that are not the same."""
    ours, theirs = plain_tensors(lead), plain_tensors(model)
    both = [n for n, t in ours.items() if not _is_free(t) and n in theirs and theirs[n].shape == t.shape]
    fix = "give both models the same"
    return [
        ShapeError(
            f"a buffer cannot be {act}", where=n, got=f"other values in {label}", want=f"those of {first}", fix=fix
        )
        for n in both
        if not torch.equal(ours[n].cpu(), theirs[n].cpu())
    ]
