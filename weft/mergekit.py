"""Merge as a configuration of mergekit says."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from weft import store
from weft.engine import Outline, combine
from weft.engine.mergekit import Plan, read
from weft.engine.run import Change, Step
from weft.error import raise_all, whole
from weft.lab.models import resolve
from weft.learn.tokenizer import tokenizer
from weft.merging import other_words
from weft.model import expressions, places, plain_tensors
from weft.progress import Progress, Silent
from weft.store.assign import names_on_disk


@dataclass(frozen=True)
class Configured:
    """A merged model, what became of each site, the declared fallbacks (where, what), and what the file says that changes nothing."""

    model: nn.Module
    changes: list[Change]
    fallbacks: list[tuple[str, str]]
    notes: tuple[str, ...]
    tokenizer: Any = None
    """The tokenizer that the result is to have, where that is not the base's, or the first model's."""


def merge_config(config: str | Path, *, seed: int = 0, progress: Progress | None = None) -> Configured:
    """The merge that a configuration of mergekit asks for, `weft.save(made.model, OUT, tokenizer=made.tokenizer)` writes it.

    Models are folders, from the working folder on, or hub ids. `seed` is that of methods that draw; mergekit draws others. How each of
    mergekit's methods is done, and where its arithmetic differs, says "Coming from mergekit" in the documents.
    Errors: PathError; FormatError and OptionError with every problem of the file, before a model is loaded; then those of
    loading and of `weft.combined`.
    """
    whole(0, seed=seed)
    plan = read(Path(config))
    models = {
        name: _loaded(name, progress) for name in dict.fromkeys([*plan.slices[0].models, plan.base or plan.models[0]])
    }
    lead = models[plan.base or plan.models[0]]
    layers = Outline(lead).blocks if plan.deep else 0
    raise_all(plan.misfit(layers))
    members, base = [models[name] for name in plan.models], models[plan.base] if plan.base is not None else None
    dtype = plan.dtype or _widest(list(models.values()))
    with (progress or Silent()).bar(plan.name, combine.reach(members, "*", base)) as done:
        made, changes, fallbacks = combine.run(
            members,
            Step.of(plan.rule.method),
            base=base,
            weights=[1.0] * len(members),
            seed=seed,
            strange=other_words(list(models.values())),
            per=_per(plan, lead, layers),
            dtype=dtype,
            done=done,
        )
    if dtype is not None:
        cast(Any, made).config.dtype = dtype
    other = models[plan.tokenizer] if plan.tokenizer is not None else lead
    return Configured(made, changes, fallbacks, plan.notes, None if other is lead else tokenizer(other))


def _loaded(name: str, progress: Progress | None) -> nn.Module:
    """A model by what a configuration calls it: a folder before anything else."""
    return store.load(name if Path(name).exists() else resolve(name, progress), progress=progress)


def _widest(models: list[nn.Module]) -> torch.dtype | None:
    """The dtype that holds what all of these are stored in; None where they are alike."""
    held = list(dict.fromkeys(p.dtype for m in models for p in places(m).values()))
    return functools.reduce(torch.promote_types, held) if len(held) > 1 else None


def _per(plan: Plan, lead: nn.Module, layers: int) -> combine.Per:
    """What each site is merged by, under the name that its tensor has in a checkpoint."""
    depths: Mapping[str, int] = Outline(lead).sites if plan.deep else {}
    shapes = {n: (1, t.numel()) for n, t in plain_tensors(lead).items()} | {
        n: e.shape for n, e in expressions(lead).items()
    }
    on_disk = names_on_disk(lead, shapes)
    return lambda name: plan.site(on_disk[name], shapes[name], depths.get(name, 0), layers)
