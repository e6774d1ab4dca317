"""Adapters by name: which a model has, which of them take part and how much, for all rows of a batch or row by row."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import Expr, Sum
from weft.expr.gated import Gated
from weft.expr.named import Named
from weft.model.adapted import Change, around, edited, name_of, scaled_biases, terms_at, without
from weft.model.branch import branches, refuse_branches, unbranch
from weft.model.devices import device_of
from weft.model.experts import ApartExperts
from weft.model.sharded import must_be_whole
from weft.model.weave import expressions, places, set_expressions


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
    """An adapter of a model: terms `adapter:NAME` beside its weights, factors and magnitudes around them, or branches of that name."""

    name: str
    strength: float
    """What its terms are multiplied by; of a factor, a magnitude and a branch 1 or 0."""
    places: tuple[str, ...]
    """Its sites, and the keys of its branches."""
    kinds: tuple[str, ...]
    """Its terms and branches, as described."""
    bytes: int
    trains: bool


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter by name, in the order that the model has them."""
    terms, beside = terms_at(model), {b.name: [c for c in branches(model) if c.name == b.name] for b in branches(model)}
    sides, made = around(model), dict[str, Adapter]()
    for name in dict.fromkeys([*terms, *sides, *beside]):
        held, others, on = terms.get(name, []), beside.get(name, []), sides.get(name, [])
        kinds = [(t.kept if isinstance(t, Gated) else t).describe() for _, t, _ in held]
        kinds += [node.kept.describe() if isinstance(node, Named) else "magnitude" for _, node in on]
        strengths = [_strength(t) for _, t, _ in held] + [float(x.on) for x in (*(n for _, n in on), *others)]
        own = [t for _, t, _ in held] + [node.kept if isinstance(node, Named) else node.g for _, node in on]
        trained = [p for t in own for p in ([t] if isinstance(t, Tensor) else t.parameters())]
        trained += [p for b in others for p in b.parameters()]
        made[name] = Adapter(
            name,
            strengths[0],
            tuple(dict.fromkeys([*(s for s, _, _ in held), *(s for s, _ in on), *(b.key for b in others)])),
            tuple(dict.fromkeys([*kinds, *(b.describe() for b in others)])),
            sum(t.nbytes if isinstance(t, Tensor) else t.nbytes() for t in own) + sum(b.nbytes() for b in others),
            any(p.requires_grad for p in trained),
        )
    return made


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Let these adapters take part, each at its strength (1 if not given), and no others; in place, and as cheap as a switch.

    From the first strength that is not 1 all terms have a gate, so that later calls write one number and compiled models stay
    compiled. What is off trains nothing. Errors, before anything changes: OptionError for unknown names and strengths that are
    not finite; ConflictError for what is on or off at other strengths than 0 and 1: branches, factors (IA3, OFT) and magnitudes (DoRA);
    and for a factor that a bias has been scaled by, which stays.
    """
    wanted = _wanted(model, [names])[0]
    must_be_whole(model.named_parameters())
    problems: list[WeftError] = []
    for name, held in around(model).items():
        for site, _ in held if wanted[name] not in (0, 1) else ():
            what, got, fix = "a factor or magnitude is on or off", f"strength {wanted[name]:g}", "choose one of them"
            problems.append(ConflictError(what, where=f"{site}: {name}", got=got, want="1 or 0", fix=fix))
        problems += scaled_biases(model, held, "turned off") if wanted[name] == 0 else []
    for b in branches(model):
        if wanted[b.name] not in (0, 1):
            got, fix = f"strength {wanted[b.name]:g}", "choose one of them"
            problems.append(ConflictError("a branch is on or off", where=b.key, got=got, want="1 or 0", fix=fix))
    raise_all(problems)
    if any(s != 1 for s in wanted.values()):
        _gate(model)
    for name, held in terms_at(model).items():
        for _, term, _ in held:
            if isinstance(term, Gated):
                with torch.no_grad():
                    term.g.fill_(wanted[name])
    for name, held in around(model).items():
        for site, node in held:
            node.on = bool(wanted[name])
            expressions(model)[site].drop_derived()
    for b in branches(model):
        b.on = bool(wanted[b.name])


@contextmanager
def per_row(model: nn.Module, rows: Sequence[str | Sequence[str] | Mapping[str, float] | None]) -> Generator[None]:
    """Within, row i of every batch has the adapters of rows[i], at their strengths, and no others: one name, several, or None.

    Errors: OptionError for unknown names; ConflictError for what cannot tell rows: branches, adapters of experts and
    convolutions, adapters around weights or under a magnitude; within, ShapeError for a batch of another number of rows.
    """
    refuse_branches(model, "a choice by row")
    chosen = _wanted(model, [() if r is None else r for r in rows])
    raise_all([_no_rows(site, name, what) for name, site, what in _rowless(model)])
    _gate(model)
    by_name = {name: torch.tensor([w[name] for w in chosen], dtype=torch.float32) for name in adapters(model)}
    held = [(name, t) for name, terms in terms_at(model).items() for _, t, _ in terms if isinstance(t, Gated)]
    _each_row(model, held, by_name)
    try:
        yield
    finally:
        _each_row(model, held, None)


def delete_adapter(model: nn.Module, name: str) -> list[str]:
    """Take an adapter away, in place: terms, factors and magnitudes, which leaves the weights what they were without, and branches.

    Returns its places. Errors: OptionError for an unknown name; ConflictError for a factor that a bias has been scaled by.
    """
    places_ = _known(model, name)[name].places
    raise_all(scaled_biases(model, around(model).get(name, []), "deleted"))
    held = expressions(model)
    made = {n: without(e, name) for n, e in held.items()}
    set_expressions(model, {n: e for n, e in made.items() if e is not held[n]})
    if any(b.name == name for b in branches(model)):
        unbranch(model, name)
    return list(places_)


def rename_adapter(model: nn.Module, name: str, new: str) -> None:
    """Give the terms and factors of an adapter another name, in place.

    Errors: OptionError for an unknown name; ConflictError for branches and a name that is taken.
    """
    if new in _known(model, name):
        want, fix = "a free name", "choose another"
        raise ConflictError("an adapter has this name", where="new", got=new, want=want, fix=fix)
    if held := [b.key for b in branches(model) if b.name == name]:
        want, fix = "terms", "add the branch again under the new name"
        raise ConflictError("a branch keeps its name", where=held[0], got=name, want=want, fix=fix)
    for _, node in around(model).get(name, []):
        if isinstance(node, Named):
            node.name = new
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


def _edit(model: nn.Module, change: Change) -> None:
    held = expressions(model)
    made = {n: edited(e, change) for n, e in held.items()}
    if changed := {n: e for n, e in made.items() if e is not held[n]}:
        set_expressions(model, changed)


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
    held = {(n, t.g.device): t.g for n, terms in terms_at(model).items() for _, t, _ in terms if isinstance(t, Gated)}

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
    for name, sides in around(model).items():
        yield from ((name, site, "it stands around the weight") for site, _ in sides)
    experts = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ApartExperts))
    for name, held in terms_at(model).items():
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
