"""Low-rank adapters for several tasks, mixed head by head from one inventory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Group, method
from weft.expr import Expr, LowRank, identity, total
from weft.expr.gated import Gated
from weft.expr.mixed import Mixed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P074", paper="2211.03831")
def poly(
    g: Group,
    *,
    skills: Annotated[int, Field(ge=1, le=64, description="pairs of factors in the inventory that tasks share")] = 4,
    heads: Annotated[
        int, Field(ge=1, le=256, description="parts of inputs and outputs that are mixed apart; 1 is Poly")
    ] = 1,
    rank: Annotated[int, Field(ge=1, le=4096, description="rank of a pair, and of a task's adapter")] = 8,
    alpha: Annotated[float, Field(gt=0, le=1e6, description="what a product is multiplied by")] = 1.0,
    start: Annotated[
        Literal["new", "routing", "average"],
        Field(
            description="new: an inventory of their own. routing: train the mixing alone, of the inventory that the weight has (MHR-z). "
            "average: its mean, as an ordinary adapter (MHR-mu)"
        ),
    ] = "new",
    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+)*$", description="the tasks' names, with commas: an adapter each"
        ),
    ] = "default",
) -> Expr:
    """Add a trainable term for each task, s B A, whose factors are mixed from an inventory of pairs that all tasks share.

    B's rows of head h are Σ_k p[h, k] B_k's, A's columns likewise, with p[h, k] = σ(z[h, k]) / Σ_k σ(z[h, k]) of the task's own logits z.
    All B_k are zero at the start, so that nothing changes. With several tasks train by task (`weft.train(..., by_task=True)`), and
    choose one (`weft.activate`) or row by row (`weft.per_row`). One head is Poly (arXiv 2202.13914), several are MHR. For new
    tasks the inventory of the tasks before stays as it is with routing, where logits start at their mean, and average has a copy.
    Departures: shares are σ itself, without noise, and s is 1 unless told.
    """
    names, (m, n) = list(dict.fromkeys(name.split(","))), g.now.shape
    held = _inventory(g.site.adapters) if start != "new" else []
    if not held:
        if start != "new":
            g.fallback("no inventory is here: a new one")
        a = (torch.rand(skills, rank, n, generator=g.rng("poly")) * 2 - 1) * math.sqrt(3 / n)
        b, a, scale = nn.Parameter(torch.zeros(skills, m, rank)), nn.Parameter(a), alpha
        logits = [1e-3 * (torch.rand(heads, skills, generator=g.rng(f"poly {t}")) * 2 - 1) for t in names]
    else:
        b, a, scale = _as_it_is(held[0].b), _as_it_is(held[0].a), held[0].scale
        logits = [torch.stack([t.z.detach() for t in held]).mean(0) for _ in names]
    if start == "average":
        terms: list[Expr] = [LowRank(*(nn.Parameter(t.detach().mean(0)) for t in (b, a)), scale) for _ in names]
    else:
        terms = [Mixed(b, a, nn.Parameter(z), scale) for z in logits]
    return total({"base": g.now, **{f"adapter:{t}": term for t, term in zip(names, terms, strict=True)}})


def _inventory(adapters: Mapping[str, Expr]) -> list[Mixed]:
    """The tasks that share the newest inventory of a weight."""
    held = [t for e in adapters.values() if isinstance(t := e.kept if isinstance(e, Gated) else e, Mixed)]
    return [t for t in held if identity(t.b) == identity(held[-1].b) and t.z.shape == held[-1].z.shape]


def _as_it_is(t: Tensor) -> Tensor:
    """The tensor, frozen: a copy where it may still be trained."""
    return t.detach().clone() if t.requires_grad else t


@poly.claim("mixed by task from four pairs gains more on three tasks than one adapter of as many numbers for all")
def claim(lab: Lab) -> Claim:
    ours = ("poly", {"name": lab.tasks, "rank": 4})
    return lab.multitask(ours=[ours], baseline=[("lora", {"rank": 16})], share=1.0)


@poly.claim("in eight heads gains more on three tasks than in one (Poly)", of="mhr")
def mhr(lab: Lab) -> Claim:
    ours, baseline = ({"name": lab.tasks, "rank": 4, "heads": heads} for heads in (8, 1))
    return lab.multitask(ours=[("poly", ours)], baseline=[("poly", baseline)], share=1.0)


@poly.claim(
    "for a new task with few examples, mixing alone gains at least half of what a new adapter gains", of="mhr_z"
)
def mhr_z(lab: Lab) -> Claim:
    before = ("poly", {"name": lab.tasks, "rank": 4, "heads": 8})
    ours, baseline = ("poly", {"name": lab.new_task, "start": "routing"}), ("lora", {"rank": 4, "name": lab.new_task})
    return lab.multitask(before=[before], ours=[ours], baseline=[baseline], share=0.5)


@poly.claim(
    "for a new task with few examples, the inventory's mean gains more than a new adapter of its rank", of="mhr_mu"
)
def mhr_mu(lab: Lab) -> Claim:
    before = ("poly", {"name": lab.tasks, "rank": 4, "heads": 8})
    ours, baseline = ("poly", {"name": lab.new_task, "start": "average"}), ("lora", {"rank": 4, "name": lab.new_task})
    return lab.multitask(before=[before], ours=[ours], baseline=[baseline], share=1.0)
