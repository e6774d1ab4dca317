"""Merge as a configuration of mergekit says."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from weft import store
from weft.engine import Outline
from weft.engine.combine import Per
from weft.engine.mergekit import Plan, read
from weft.engine.run import Change
from weft.error import raise_all
from weft.lab.models import resolve
from weft.learn.tokenizer import tokenizer
from weft.merging import planned
from weft.model import expressions, places, plain_tensors
from weft.progress import Progress
from weft.store.alike import loaded
from weft.store.assign import names_on_disk


@dataclass(frozen=True)
class Configured:
    """What became of each site, the declared fallbacks (where, what), and what the file says that changes nothing."""

    changes: list[Change]
    fallbacks: list[tuple[str, str]]
    notes: tuple[str, ...]


def merge_config(
    config: str | Path, out: str | Path, *, replace: bool = False, seed: int = 0, progress: Progress | None = None
) -> Configured:
    """Write the model that a configuration of mergekit asks for, weight by weight, as `weft.combine_to` does.

    Models are folders, from the working folder on, or hub ids. `seed` is that of methods that draw; mergekit draws others. What weft
    does with each of mergekit's methods, and where the arithmetic differs, is in the documents: Coming from mergekit.
    Errors: PathError; FormatError and OptionError with every problem of the file, before a model is loaded; then those of
    loading, and of `weft.combine_to`.
    """
    plan = read(Path(config))
    first = plan.base or plan.models[0]
    models = _loaded(list(dict.fromkeys([first, *plan.slices[0].models])), plan.deep, progress)
    size = store.nbytes(models[first])
    for held in models.values():
        store.may_write(held, out, replace=replace, nbytes=size)
    layers = Outline(models[first]).blocks if plan.deep else 0
    raise_all(plan.misfit(layers))
    merge = planned(
        [models[name] for name in plan.models],
        plan.rule.method,
        base=models[first] if plan.base is not None else None,
        per=_per(plan, models[first], layers),
        dtype=plan.dtype or _widest(list(models.values())),
        seed=seed,
        progress=progress,
    )
    words = tokenizer(models[plan.tokenizer]) if plan.tokenizer not in (None, first) else None
    said = {"models": plan.models, "base": plan.base, "method": plan.name, "config": Path(config).name, "seed": seed}
    text = {"mergekit_config.yml": Path(config).read_text("utf8")}
    made = merge.write(out, replace=replace, manifest={"merged": said}, files=text, tokenizer=words)
    return Configured(made.changes, made.fallbacks, plan.notes)


def _loaded(names: list[str], deep: bool, progress: Progress | None) -> dict[str, nn.Module]:
    """Models by what a configuration calls them, folders before anything else; without their classes where they are alike.

    What depends on the depth needs the class, which knows what stands behind the layers.
    """
    folders = [store.find(name if Path(name).exists() else resolve(name, progress)) for name in names]
    found = [store.load(f, progress=progress) for f in folders] if deep else loaded(folders, progress)
    return dict(zip(names, found, strict=True))


def _widest(models: list[nn.Module]) -> torch.dtype | None:
    """The dtype that holds what all of these are stored in; None where they are alike."""
    held = list(dict.fromkeys(p.dtype for m in models for p in places(m).values()))
    return functools.reduce(torch.promote_types, held) if len(held) > 1 else None


def _per(plan: Plan, lead: nn.Module, layers: int) -> Per:
    """What each site is merged by, under the name that its tensor has in a checkpoint."""
    depths: Mapping[str, int] = Outline(lead).sites if plan.deep else {}
    shapes = {n: (1, t.numel()) for n, t in plain_tensors(lead).items()} | {
        n: e.shape for n, e in expressions(lead).items()
    }
    on_disk = names_on_disk(lead, shapes)
    return lambda name: plan.site(on_disk[name], shapes[name], depths.get(name, 0), layers)
