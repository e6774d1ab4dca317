"""Merge as a configuration of mergekit says."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from weft import store
from weft.engine import Outline, combine
from weft.engine.mergekit import Plan, read
from weft.engine.run import Step
from weft.error import raise_all, whole
from weft.lab.models import resolve
from weft.learn.tokenizer import tokenizer
from weft.merging import Outcome, Planned, other_words
from weft.model import expressions, places, plain_tensors
from weft.progress import Progress, Silent
from weft.store.assign import names_on_disk


@dataclass(frozen=True)
class Configured(Outcome):
    """What came of a merge, what its file says that changes nothing, and the merged model, where it was not written to a folder."""

    notes: tuple[str, ...]
    model: nn.Module | None


def merge_config(
    config: str | Path,
    out: str | Path | None = None,
    *,
    replace: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Configured:
    """The merge that a configuration of mergekit asks for, saved in `out` if that is given.

    Models are folders, from the working folder on, or hub ids. `seed` is that of methods that draw; mergekit draws others. What weft
    does with each of mergekit's methods, and where the arithmetic differs, is in the documents: Coming from mergekit.
    Errors: PathError; FormatError and OptionError with every problem of the file, before a model is loaded; then those of
    loading, of `weft.combined` and of `weft.save`.
    """
    whole(0, seed=seed)
    plan = read(Path(config))
    first = plan.base or plan.models[0]
    models = {name: _loaded(name, progress) for name in dict.fromkeys([first, *plan.slices[0].models])}
    if out is not None:
        for held in models.values():
            store.may_write(held, out, replace=replace, nbytes=store.nbytes(models[first]))
    layers = Outline(models[first]).blocks if plan.deep else 0
    raise_all(plan.misfit(layers))
    members, base = [models[name] for name in plan.models], models[first] if plan.base is not None else None
    dtype = plan.dtype or _widest(list(models.values()))
    merged = Planned(
        combine.plan(
            members,
            Step.of(plan.rule.method),
            base=base,
            seed=seed,
            strange=other_words(list(models.values())),
            per=_per(plan, models[first], layers),
            dtype=dtype,
        ),
        [],
        progress or Silent(),
    )
    if out is None:
        made = merged.run()
        return Configured(made.changes, made.fallbacks, made.tried, plan.notes, made.model)
    words = tokenizer(models[plan.tokenizer]) if plan.tokenizer not in (None, first) else None
    said = {"models": plan.models, "base": plan.base, "method": plan.name, "config": Path(config).name, "seed": seed}
    text = {"mergekit_config.yml": Path(config).read_text("utf8")}
    done = merged.write(out, replace=replace, tokenizer=words, manifest={"merged": said}, files=text)
    return Configured(done.changes, done.fallbacks, done.tried, plan.notes, None)


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
