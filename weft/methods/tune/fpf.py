"""Full fine-tuning of the kinds of parameters that tasks move most."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor, nn

from weft.engine import Outline, Planned, method
from weft.error import ConflictError, OptionError, raise_all
from weft.expr import valueless
from weft.model import expressions, site, vectors
from weft.store import load

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="recipe", rows="P150", paper="2304.04158", uses=("full",))
def fpf(
    model: Outline,
    *,
    share: Annotated[
        float, Field(gt=0, le=1, description="of all numbers, those that train at most; one kind does at least")
    ] = 0.05,
    after: Annotated[
        str,
        Field(
            description="folders of the model after one task and the next, with commas; if not given, what this one was tuned by"
        ),
    ] = "",
) -> list[Planned]:
    """Tune the kinds of parameters, such as all norms before attention, that move most from task to task; all else is frozen.

    A kind's movement is the mean of |θ_t - θ_(t-1)| over its numbers, of all blocks, and over the tasks t, from the pretrained model on.
    For finetuning on a small buffer of all tasks, after they were learnt (FPF) or now and then between them (k-FPF).
    """
    folders, moved = [f for f in after.split(",") if f], dict.fromkeys(model.sites, 0.0)
    models = [None, *(load(f) for f in folders)] if folders else [None, model.model]
    for old, new in pairwise(models):
        for name in moved:
            moved[name] += float((_value(model, new, name) - _value(model, old, name)).abs().double().sum())
    if not any(moved.values()):
        got, want, fix = (
            "the pretrained value everywhere",
            "a tuned model",
            "give the folders of models that were tuned on tasks",
        )
        raise OptionError("no task moved anything", where="after", got=got, want=want, fix=fix)
    return [model.step("full", _most(model, moved, share))]


def _most(model: Outline, moved: dict[str, float], share: float) -> list[str]:
    """The sites of the kinds that moved most, as long as they hold no more than this share of all numbers."""
    kinds: dict[str, list[str]] = {}
    for name in moved:
        kinds.setdefault(model.kind(name), []).append(name)
    size = {n: site(model.model, n).now.shape for n in moved}
    count = {k: sum(size[n][0] * size[n][1] for n in names) for k, names in kinds.items()}
    order = sorted(kinds, key=lambda k: -sum(moved[n] for n in kinds[k]) / max(1, count[k]))
    chosen, held = order[:1], count[order[0]]
    for kind in order[1:]:
        if held + count[kind] > share * sum(count.values()):
            break
        chosen.append(kind)
        held += count[kind]
    return [n for kind in chosen for n in kinds[kind]]


def _value(model: Outline, of: nn.Module | None, name: str) -> Tensor:
    """A site's value in a model, or its pretrained one, before any turn. Errors: ConflictError for a model that has no such site."""
    s = site(model.model if of is None else of, name) if of is None or name in _names(of) else None
    mine = site(model.model, name).now.shape
    if s is None or s.now.shape != mine:
        got, want, fix = (
            "no such weight" if s is None else list(s.now.shape),
            list(mine),
            "give models that were tuned from this one",
        )
        raise ConflictError("this is another model", where=name, got=got, want=want, fix=fix)
    raise_all(valueless({name: s.now}))
    value = s.original if of is None else s.now.dense().detach().float()
    return value if s.tap is None else s.tap.back(value)


def _names(model: nn.Module) -> set[str]:
    return {*expressions(model), *vectors(model)}


@fpf.claim(
    "after three tasks, tuning the 5 % that they moved most gains on a new one at least 80 % of what tuning all gains"
)
def claim(lab: Lab) -> Claim:
    return lab.multitask(before=[("full", {})], ours=[("fpf", {})], baseline=[("full", {})], share=0.8)
