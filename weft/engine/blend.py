"""Blend adapters of one model: what they add to a weight, summed or merged, as one more adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weft.engine.miscalled import uneven
from weft.engine.registry import get
from weft.engine.run import Step
from weft.error import ConflictError, OptionError, raise_all
from weft.expr import Dense, Expr, LowRank, SparseDelta, Sum, fork, terms_of, total, valueless
from weft.expr.gated import Gated, settled
from weft.expr.mixed import added_low_rank
from weft.linalg.lowrank import truncate
from weft.model import Sources, adapters, branches, expressions, name_of, set_expressions
from weft.model.adapted import around
from weft.model.devices import device_of
from weft.model.parts import added_sparse

Parts = list[tuple[float, Expr]]


def run(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    method: str,
    *,
    rank: int | None,
    seed: int,
    options: Mapping[str, Any],
) -> list[str]:
    """See `weft.blend_adapters`."""
    step = None if method == "linear" else Step.of(method, **options)
    _check(model, weights, into, step, rank, options)
    made: dict[str, Expr] = {}
    for site, expr in expressions(model).items():
        held = {n: _added(expr, n) for n in weights}
        if not any(held.values()):
            continue
        new = _sum([(weights[n], t) for n, terms in held.items() for t in terms]) if step is None else None
        if step is not None:
            new = _merged(site, expr, held, weights, step, rank, seed)
        if new is not None:
            made[site] = total({**terms_of(expr), f"adapter:{into}": new})
    set_expressions(model, made)
    return list(made)


def _check(
    model: nn.Module, weights: Mapping[str, float], into: str, step: Step | None, rank: int | None, options: Any
) -> None:
    held, where = adapters(model), type(model).__name__
    if unknown := [n for n in weights if n not in held]:
        want = ", ".join(held) or "none: there is no adapter"
        raise OptionError("no such adapter", where=where, got=", ".join(unknown), want=want, fix="choose of these")
    if not weights or not all(torch.isfinite(torch.tensor(w)) for w in weights.values()):
        want, fix = "one finite weight an adapter, one or more", "give others"
        raise OptionError("these weights blend nothing", where="weights", got=dict(weights), want=want, fix=fix)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", into):
        want, fix = "1 to 64 letters, digits, _ and -", "choose another"
        raise OptionError("an adapter cannot have this name", where="into", got=into, want=want, fix=fix)
    if into in held:
        raise ConflictError(
            "an adapter has this name", where="into", got=into, want="a free name", fix="choose another"
        )
    if step is None and (options or rank is not None):
        got, fix = ", ".join([*options, *(["rank"] if rank is not None else [])]), "leave them out"
        raise OptionError("a linear blend takes no options", where="linear", got=got, want="none", fix=fix)
    if step is not None and get(step.method).kind != "merge":
        got, fix = f"a {get(step.method).kind} method", "weft methods shows kinds"
        raise OptionError("this method merges nothing", where=step.method, got=got, want="linear, or a merge", fix=fix)
    if step is not None and (asked := sorted(step.needs - {"base"})):
        got, want = f"a merge that needs {', '.join(asked)}", "one that looks at weights alone"
        fix = "merge models instead: weft.combine"
        raise OptionError("adapters cannot be merged so", where=step.method, got=got, want=want, fix=fix)
    for where, got, want, fix in uneven(step, len(weights)) if step is not None else ():
        raise OptionError("adapters cannot be merged so", where=where, got=got, want=want, fix=fix)
    if beside := [b.key for b in branches(model) if b.name in weights]:
        want, fix = "terms of weights", "leave it out"
        raise ConflictError("a branch is not blended", where=beside[0], got="a branch", want=want, fix=fix)
    whole = around(model).keys() & weights.keys()
    whole |= {n for n in weights if not any(_added(e, n) for e in expressions(model).values())}
    if whole:
        got, want = "it stands around weights, or under a magnitude", "terms of weights"
        fix = "merge models instead: weft.combine"
        raise ConflictError("this adapter is not blended", where=sorted(whole)[0], got=got, want=want, fix=fix)
    if step is not None:
        raise_all(
            valueless({f"{s}: {n}": t for s, e in expressions(model).items() for n in weights for t in _added(e, n)})
        )


def _added(expr: Expr, name: str) -> list[Expr]:
    """What an adapter adds to a weight, at full strength."""
    terms = [t for r, t in terms_of(expr).items() if name_of(r) == name]
    return [settled(t.kept if isinstance(t, Gated) else t) for t in terms]


def _sum(parts: Parts) -> Expr | None:
    """The exact sum of these multiples: what is low-rank as one term, what is sparse as one, and others behind a fixed gate."""
    parts = [(w, t) for w, t in parts if w]
    low = [(w, t) for w, t in parts if isinstance(t, LowRank)]
    sparse = [(w, t) for w, t in parts if isinstance(t, SparseDelta)]
    terms: list[Expr] = [added_low_rank(low)] if low else []
    terms += [added_sparse(sparse)] if sparse else []
    for w, t in parts:
        if not isinstance(t, LowRank | SparseDelta):
            same = fork(t).requires_grad_(False)
            terms.append(same if w == 1 else Gated(torch.full((1,), w, device=device_of(t)), same))
    if len(terms) < 2:
        return terms[0] if terms else None
    return Sum({"base": terms[0]} | {f"adapter:{i}": t for i, t in enumerate(terms[1:], 1)})


def _merged(
    site: str,
    expr: Expr,
    held: Mapping[str, list[Expr]],
    weights: Mapping[str, float],
    step: Step,
    rank: int | None,
    seed: int,
) -> Expr:
    """The merge of what every adapter adds, none where it has no term here, to a base of zeros."""
    nothing = Dense(torch.zeros(expr.shape))
    members = {n: _sum([(1.0, t) for t in terms]) or nothing for n, terms in held.items()}
    sources = Sources(
        name=site,
        members=tuple(members.values()),
        weights=tuple(weights[n] for n in members),
        dtype=torch.float32,
        base=nothing,
        seed=seed,
        labels=tuple(members),
    )
    value = get(step.method)(sources, **dict(step.options)).dense().detach()
    return Dense(value) if rank is None else truncate(value, min(rank, *value.shape), torch.float32)
