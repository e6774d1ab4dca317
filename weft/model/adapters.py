"""Adapters by name: which a model has, which of them take part and how much, for all rows of a batch or row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import Expr, Sum, total
from weft.expr.fields import each, fields
from weft.expr.gated import Gated
from weft.expr.weightnorm import WeightNorm
from weft.model.branch import branches, refuse_branches, unbranch
from weft.model.devices import device_of
from weft.model.experts import ApartExperts
from weft.model.sharded import must_be_whole
from weft.model.weave import expressions, places, set_expressions

Change = Callable[[dict[str, Expr]], dict[str, Expr]]
"""What becomes of the adapter terms of a sum, by role."""


@dataclass(frozen=True)
class TrainedTerm:
    """A term of an adapter with one tensor that trains."""

    site: str
    role: str
    term: Expr
    """Without its gate."""
    beside: Mapping[str, Expr]
    """Base and compensation of the sum that it is in."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model: terms `adapter:NAME` beside its weights, or branches of that name."""

    name: str
    strength: float
    """What its terms are multiplied by; of a branch 1 or 0."""
    places: tuple[str, ...]
    """Its sites, and the keys of its branches."""
    kinds: tuple[str, ...]
    """Its terms and branches, as described."""
    bytes: int
    trains: bool


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter by name, in the order that the model has them."""
    terms, beside = _terms(model), {b.name: [c for c in branches(model) if c.name == b.name] for b in branches(model)}
    made: dict[str, Adapter] = {}
    for name in dict.fromkeys([*terms, *beside]):
        held, others = terms.get(name, []), beside.get(name, [])
        kinds = [(t.kept if isinstance(t, Gated) else t).describe() for _, t, _ in held]
        strengths = [_strength(t) for _, t, _ in held] + [float(b.on) for b in others]
        trained = [p for _, t, _ in held for p in t.parameters()] + [p for b in others for p in b.parameters()]
        made[name] = Adapter(
            name,
            strengths[0],
            tuple(dict.fromkeys([site for site, _, _ in held] + [b.key for b in others])),
            tuple(dict.fromkeys([*kinds, *(b.describe() for b in others)])),
            sum(t.nbytes() for _, t, _ in held) + sum(b.nbytes() for b in others),
            any(p.requires_grad for p in trained),
        )
    return made


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Let these adapters take part, each at its strength (1 if not given), and no others; in place, and as cheap as a switch.

    From the first strength that is not 1 all terms have a gate, so that later calls write one number and compiled models stay
    compiled. What is off trains nothing. Errors, before anything changes: OptionError for unknown names and strengths that are
    not finite; ConflictError for branches at other strengths than 0 and 1, and for adapters that are no terms: under a magnitude
    (DoRA) the weight without the adapter is not known to it.
    """
    wanted = _wanted(model, [names])[0]
    must_be_whole(model.named_parameters())
    problems: list[WeftError] = []
    for name, held in _terms(model).items():
        for site, _, under in held:
            if under and wanted[name] != 1:
                got, want = f"strength {wanted[name]:g} under a magnitude", "1"
                fix = "keep it on, merge it (weft.merge), or give each adapter a weft.fork(model) of its own"
                what = "this adapter cannot be turned"
                problems.append(ConflictError(what, where=f"{site}: {name}", got=got, want=want, fix=fix))
    for b in branches(model):
        if wanted[b.name] not in (0, 1):
            got, fix = f"strength {wanted[b.name]:g}", "choose one of them"
            problems.append(ConflictError("a branch is on or off", where=b.key, got=got, want="1 or 0", fix=fix))
    raise_all(problems)
    if any(s != 1 for s in wanted.values()):
        _gate(model)
    for name, held in _terms(model).items():
        for _, term, _ in held:
            if isinstance(term, Gated):
                with torch.no_grad():
                    term.g.fill_(wanted[name])
    for b in branches(model):
        b.on = bool(wanted[b.name])


@contextmanager
def per_row(model: nn.Module, rows: Sequence[str | Sequence[str] | Mapping[str, float] | None]) -> Generator[None]:
    """Within, row i of every batch has the adapters of rows[i], at their strengths, and no others: one name, several, or None.

    Errors: OptionError for unknown names; ConflictError for what cannot tell rows: branches, adapters of experts and
    convolutions, adapters under a magnitude; within, ShapeError for a batch of another number of rows.
    """
    refuse_branches(model, "a choice by row")
    chosen = _wanted(model, [() if r is None else r for r in rows])
    raise_all([_no_rows(site, name, what) for name, site, what in _rowless(model)])
    _gate(model)
    by_name = {name: torch.tensor([w[name] for w in chosen], dtype=torch.float32) for name in adapters(model)}
    held = [(name, t) for name, terms in _terms(model).items() for _, t, _ in terms if isinstance(t, Gated)]
    _each_row(model, held, by_name)
    try:
        yield
    finally:
        _each_row(model, held, None)


def delete_adapter(model: nn.Module, name: str) -> list[str]:
    """Take an adapter away, in place: its terms, which leaves the weights what they were without, and its branches.

    Returns its places. Errors: OptionError for an unknown name; ConflictError where a magnitude was trained with it.
    """
    places_ = _known(model, name)[name].places
    raise_all([_bound(site, name, "deleted") for site, _, under in _terms(model).get(name, []) if under])
    _edit(model, lambda terms: {r: t for r, t in terms.items() if name_of(r) != name})
    if any(b.name == name for b in branches(model)):
        unbranch(model, name)
    return list(places_)


def rename_adapter(model: nn.Module, name: str, new: str) -> None:
    """Give the terms of an adapter another name, in place.

    Errors: OptionError for an unknown name; ConflictError for branches and a name that is taken.
    """
    if new in _known(model, name):
        want, fix = "a free name", "choose another"
        raise ConflictError("an adapter has this name", where="new", got=new, want=want, fix=fix)
    if held := [b.key for b in branches(model) if b.name == name]:
        want, fix = "terms", "add the branch again under the new name"
        raise ConflictError("a branch keeps its name", where=held[0], got=name, want=want, fix=fix)
    role = f"adapter:{name}"
    _edit(
        model,
        lambda terms: {
            f"adapter:{new}{r.removeprefix(role)}" if name_of(r) == name else r: t for r, t in terms.items()
        },
    )


def trained_terms(model: nn.Module) -> list[TrainedTerm]:
    """The adapter terms in which one tensor trains, by site and in order."""
    found: list[TrainedTerm] = []

    def look(site: str, expr: Expr) -> None:
        if isinstance(expr, Sum):
            held = expr.named()
            beside = {r: t for r, t in held.items() if name_of(r) is None}
            for role, term in held.items():
                bare = term.kept if isinstance(term, Gated) else term
                if role not in beside and sum(p.requires_grad for p in bare.parameters()) == 1:
                    found.append(TrainedTerm(site, role, bare, beside))
        for kid in expr.kids():
            look(site, kid)

    for site, expr in expressions(model).items():
        look(site, expr)
    return found


def put_terms(model: nn.Module, made: Mapping[int, Mapping[str, Expr]]) -> None:
    """Put other terms, by role, in the place of adapter terms, in place. `made` goes by the ids of the old ones; gates stay."""

    def other(role: str, term: Expr) -> dict[str, Expr]:
        new = made.get(id(term.kept if isinstance(term, Gated) else term), {role: term})
        return {r: term.rebuild(kept=t) if isinstance(term, Gated) and t is not term else t for r, t in new.items()}

    _edit(model, lambda terms: {r: t for role, term in terms.items() for r, t in other(role, term).items()})


def name_of(role: str) -> str | None:
    """The adapter that a role belongs to: `adapter:NAME`, or `adapter:NAME-start`, which goes with it."""
    return role.removeprefix("adapter:").removesuffix("-start") if role.startswith("adapter:") else None


def _edited(expr: Expr, change: Change) -> Expr:
    """The tree after a change of every sum's adapter terms; itself where nothing changes."""
    if isinstance(expr, Sum):
        old = expr.named()
        rest = {r: _edited(t, change) for r, t in old.items() if name_of(r) is None}
        new = rest | change({r: t for r, t in old.items() if name_of(r) is not None})
        return total(new) if _differs(old, new) else expr
    made: dict[str, object] = {}
    for f in (f for f in fields(type(expr)) if f.kind in ("child", "children")):
        held = expr.value(f)
        if _differs(held, new := each(partial(_edited, change=change), held)):
            made[f.name] = new
    return expr.rebuild(**made) if made else expr


def _differs(old: object, new: object) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return list(old) != list(new) or any(old[k] is not new[k] for k in old)
    if isinstance(old, tuple) and isinstance(new, tuple):
        return any(a is not b for a, b in zip(old, new, strict=True))
    return old is not new


def _edit(model: nn.Module, change: Change) -> None:
    held = expressions(model)
    made = {n: _edited(e, change) for n, e in held.items()}
    if changed := {n: e for n, e in made.items() if e is not held[n]}:
        set_expressions(model, changed)


def _terms(model: nn.Module) -> dict[str, list[tuple[str, Expr, bool]]]:
    """By adapter its terms: the site, the term, and whether it stands under a magnitude."""
    found: dict[str, list[tuple[str, Expr, bool]]] = {}

    def look(site: str, expr: Expr, under: bool) -> None:
        if isinstance(expr, Sum):
            for role, term in expr.named().items():
                if (name := name_of(role)) is not None:
                    found.setdefault(name, []).append((site, term, under))
                else:
                    look(site, term, under)
            return
        for kid in expr.kids():
            look(site, kid, under or isinstance(expr, WeightNorm))

    for site, expr in expressions(model).items():
        look(site, expr, False)
    return found


def _strength(term: Expr) -> float:
    return float(term.g) if isinstance(term, Gated) else 1.0


def _known(model: nn.Module, *names: str) -> dict[str, Adapter]:
    """All adapters. Errors: OptionError for names that are none of theirs."""
    held = adapters(model)
    if unknown := [n for n in dict.fromkeys(names) if n not in held]:
        want, fix = ", ".join(held) or "none: there is no adapter", "weft.adapters(model) lists them"
        raise OptionError("no such adapter", where=type(model).__name__, got=", ".join(unknown), want=want, fix=fix)
    return held


def _wanted(model: nn.Module, choices: Sequence[str | Sequence[str] | Mapping[str, float]]) -> list[dict[str, float]]:
    """For each choice the strength of every adapter of the model."""
    given = [c if isinstance(c, Mapping) else dict.fromkeys([c] if isinstance(c, str) else c, 1.0) for c in choices]
    held = _known(model, *(name for g in given for name in g))
    if bad := {n: s for g in given for n, s in g.items() if not math.isfinite(s)}:
        want, fix = "finite numbers", "give others"
        raise OptionError("a strength is not finite", where=", ".join(bad), got=list(bad.values()), want=want, fix=fix)
    return [{n: float(g.get(n, 0.0)) for n in held} for g in given]


def _gate(model: nn.Module) -> None:
    """Give every adapter term a gate, one a name and device, where it has none."""
    held = {(n, t.g.device): t.g for n, terms in _terms(model).items() for _, t, _ in terms if isinstance(t, Gated)}

    def gated(role: str, term: Expr) -> Expr:
        if isinstance(term, Gated):
            return term
        at = name_of(role) or "", device_of(term)
        held.setdefault(at, nn.Parameter(torch.ones(1, device=at[1]), requires_grad=False))
        return Gated(held[at], term)

    _edit(model, lambda terms: {r: gated(r, t) for r, t in terms.items()})


def _each_row(model: nn.Module, held: Sequence[tuple[str, Gated]], by_name: Mapping[str, Tensor] | None) -> None:
    for name, term in held:
        term.by_row(by_name[name].to(term.g.device) if by_name is not None else None)
    for expr in expressions(model).values():
        expr.drop_derived()


def _rowless(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Adapters at places that do not know which row of the batch they see."""
    experts = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ApartExperts))
    for name, held in _terms(model).items():
        for site, _, under in held:
            place = places(model)[site]
            if under:
                yield name, site, "it stands under a magnitude"
            elif any(path.startswith(experts) for path in place.modules):
                yield name, site, "an expert sees tokens of all rows together"
            elif place.kind == "conv":
                yield name, site, "a convolution has one kernel for all rows"


def _no_rows(site: str, name: str, why: str) -> WeftError:
    fix = "activate one adapter for all rows, or leave this site out of it"
    return ConflictError(
        "this adapter cannot be chosen by row",
        where=f"{site}: {name}",
        got=why,
        want="a term of a linear layer or an embedding",
        fix=fix,
    )


def _bound(site: str, name: str, what: str) -> WeftError:
    fix = "start from the model without it, or merge it (weft.merge)"
    return ConflictError(
        f"this adapter cannot be {what}",
        where=f"{site}: {name}",
        got="it stands under a magnitude that was trained with it",
        want="a term",
        fix=fix,
    )
