"""Combine models by a merge: everything is compared first, then merged a weight at a time."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.engine.miscalled import Per, asked, misfit, misused, unfit
from weft.engine.registry import get
from weft.engine.run import Change, Step, chain_key, code_version
from weft.engine.scopes import Scopes
from weft.engine.unlike import refusals
from weft.error import WeftError, raise_all
from weft.expr import Dense, Expr, spec, tensors
from weft.model import (
    Scope,
    Sources,
    expressions,
    first_vectors,
    fits,
    fork,
    match,
    places,
    plain_tensors,
    set_expressions,
    site,
)
from weft.model.parts import Take
from weft.model.weave import Original
from weft.stats import Stats
from weft.store.save import shared
from weft.store.tensors import Later, laid_out, word_sum

Base = nn.Module | Sequence[nn.Module] | None
"""What members were tuned from: one model for all, or one for each; before these there may be the one that they are added to."""


@dataclass(frozen=True)
class Plan:
    """A merge of models that were compared: what a weight becomes is found when it is asked for."""

    lead: nn.Module
    """Whose configuration, tokenizer and other tensors the result has: the base, or the first model."""
    named: Mapping[str, nn.Module]
    sites: list[str]
    vectors: list[str]
    """Norms, biases and the like."""
    merge: _Merge

    def sources(self, name: str) -> Sources:
        """What is merged at a site, or of a vector as one row."""
        return replace(self._sources(name), widen=functools.partial(self._scopes.wider, name))

    def _sources(self, name: str, labels: Sequence[str] | None = None) -> Sources:
        if name in places(self.lead):
            held = {label: site(m, name).now for label, m in self.named.items()}
            return self.merge.sources(
                name, held, self._dtypes(name), places(self.lead)[name].kind != "embedding", labels
            )
        rows = {label: Dense(held[name].detach().cpu().reshape(1, -1)) for label, held in self._loose.items()}
        return self.merge.sources(name, rows, {label: e.w.dtype for label, e in rows.items()}, labels=labels)

    def _dtypes(self, name: str) -> dict[str, torch.dtype]:
        return {label: places(m)[name].dtype for label, m in self.named.items()}

    @functools.cached_property
    def _scopes(self) -> Scopes:
        how = {n: f"{step.describe()} {[*weights]}" for n, (step, weights) in self.merge.how.items()}
        return Scopes(self.lead, (*self.sites, *self.vectors), how, self._sources, self.merge.about)

    def weight(self, name: str) -> Expr:
        """What a site becomes. Errors: the method's."""
        return self.merge(self.sources(name))

    def vector(self, name: str) -> Tensor:
        """What a vector becomes, in its own dtype and shape. Errors: the method's."""
        made = self.merge(self.sources(name))
        like = next(iter(self._loose.values()))[name]
        return made.dense().detach().to(like.dtype, copy=True).view(like.shape)

    @functools.cached_property
    def _loose(self) -> dict[str, dict[str, Tensor]]:
        return {label: plain_tensors(m) for label, m in self.named.items()}

    def later(self, name: str, done: Callable[[Change], None]) -> Later | None:
        """The plain matrix that a site becomes, made when it is written; None where that is not known before."""
        method = get(self.merge.step.method)
        if method.adds or not all(isinstance(site(m, name).now, Dense) for m in self.named.values()):
            return None
        found = functools.cache(lambda: self.sources(name))

        def make(take: Take | None) -> Tensor:
            expr = self.merge(replace(found(), take=take))
            done(self.change(name, expr))
            return tensors(expr)["w"].detach()

        shape = site(self.lead, name).now.shape
        return Later(self.merge.made(self._dtypes(name)), shape, make, lambda: self._about(found()), slices=True)

    def _about(self, s: Sources) -> str:
        """A hash of all that a weight depends on: of what is measured with it too."""
        scope = cast(Scope, dict(self.merge.how[s.name][0].options).get("scope", "weight"))
        told = [self.merge.about(s), *self._scopes.about_all(s.name, scope)]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def change(self, name: str, after: Expr) -> Change:
        """What became of a site."""
        before = ", ".join(dict.fromkeys(site(m, name).now.describe() for m in self.named.values()))
        return Change(name, before, after.describe(), after.nbytes(), None)


def plan(
    models: Sequence[nn.Module],
    step: Step,
    *,
    base: Base = None,
    weights: Sequence[float] | None = None,
    at: str | Sequence[str] = "*",
    per: Per | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    strange: Sequence[WeftError] = (),
    look: Look | None = None,
) -> Plan:
    """Compare everything, before anything runs.

    Weights, norms and biases that `at` does not match, and everything else, are those of the base, or of the first model. Of several
    bases, what each member was tuned from, the first is what task vectors are added to; it is no member's if there is one more. `per`:
    other options of the step's method and other weights, by site. `dtype`: what dense results are stored in, rather than in the base's.
    `look` finds what data says of a member, for a merge that needs it.
    Errors, all at once: OptionError for a wrong call, those of `refusals`, and `strange`.
    """
    method, given = get(step.method), tuple(weights) if weights is not None else (1.0,) * len(models)
    bases = bases_of(base)
    wrong = misused(method, models, bases, blind=look is None and bool(step.needs - {"base"}))
    wrong += unfit(method, given, len(models))
    raise_all([*wrong, *(refusals(named(models, bases)) if models else ()), *strange])
    lead = [*bases, *models][0]
    sites, vectors = _chosen(lead, at)
    how, wrong = asked(per or (lambda _: (step, given)), [*sites, *vectors])
    raise_all([*wrong, *(p for name, (one, each) in how.items() for p in misfit(name, step, one, each, len(models)))])
    seen = {label: look(i) for i, label in enumerate(named(models))} if look is not None else dict[str, Seen]()
    return Plan(lead, named(models, bases), sites, vectors, _Merge(step, how, tuple(named(models)), seed, seen, dtype))


def run(made: Plan, done: Callable[[int], None] | None = None) -> tuple[nn.Module, list[Change]]:
    """A new woven model, frozen, by a plan, and what became of each site. The models are not changed. Errors: the method's."""
    model, changes = _fresh(made), list[Change]()
    for name in made.sites:
        expr = made.weight(name)
        set_expressions(model, {name: expr})
        changes.append(made.change(name, expr))
        if done:
            done(1)
    _put_vectors(model, made)
    _settle(model, list(made.named.values()), made.sites)
    return model.requires_grad_(False), changes


def begin(made: Plan, changes: list[Change], out: Path) -> tuple[nn.Module, dict[str, Later]]:
    """The merged model but for sites whose plain values are made when they are asked for, and these; `changes` are told as they come.

    Plain values of other sites, which may as well have become terms, lie on the disk where `out` will. Errors: the method's; PathError,
    ResourceError.
    """
    model, later, alone = _fresh(made), dict[str, Later](), not shared(made.lead)
    for name in made.sites:
        value = made.later(name, changes.append) if alone else None
        if value is not None:
            later[name] = value
            continue
        expr = made.weight(name)
        changes.append(made.change(name, expr))
        set_expressions(model, {name: Dense(laid_out(expr.w.detach(), out)) if isinstance(expr, Dense) else expr})
    _put_vectors(model, made)
    _settle(model, list(made.named.values()), made.sites)
    return model.requires_grad_(False), later


def _fresh(made: Plan) -> nn.Module:
    """A fork of the lead, whose configuration says what results are stored in."""
    model = fork(made.lead)
    if made.merge.dtype is not None and hasattr(model, "config"):
        cast(Any, model).config.dtype = made.merge.dtype
    return model


def _put_vectors(model: nn.Module, made: Plan) -> None:
    free = plain_tensors(model)
    for name in made.vectors:
        free[name].data = made.vector(name).to(free[name].device)


@dataclass(frozen=True)
class Seen:
    """What data says of one model, by site: the Grams of its inputs, and the diagonal of its Fisher information."""

    stats: Stats | None = None
    fisher: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def gram(self, name: str) -> Tensor | None:
        """E[x xᵀ] of what a linear layer reads; None where nothing went through, or it is looked up as well."""
        uses = self.stats.evidence([name])[name] if self.stats is not None else ()
        return uses[0].gram if len(uses) == 1 and uses[0].tokens else None


Look = Callable[[int], Seen]
"""What data says of the model at this place of the list."""


@dataclass(frozen=True)
class _Merge:
    """Every site's step with the weights of its members, what errors call them, and what data says of them."""

    step: Step
    how: Mapping[str, tuple[Step, Sequence[float]]]
    labels: tuple[str, ...]
    seed: int
    seen: Mapping[str, Seen]
    dtype: torch.dtype | None = None
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def sources(
        self,
        name: str,
        held: Mapping[str, Expr],
        dtypes: Mapping[str, torch.dtype],
        linear: bool = False,
        labels: Sequence[str] | None = None,
    ) -> Sources:
        """One weight, of which `held` has every model's; members in this order, or in one that their values alone decide."""
        weights = dict(zip(self.labels, map(float, self.how[name][1]), strict=True))
        marks = {label: mark(held[label]) for label in self.labels} if labels is None else {}
        labels = labels or sorted(self.labels, key=lambda label: (marks[label], weights[label]))
        seen = [self.seen[label] for label in labels if label in self.seen]
        several = len(held) > len(labels) + 1
        return Sources(
            name=name,
            members=tuple(held[label] for label in labels),
            weights=tuple(weights[label] for label in labels),
            dtype=self.made(dtypes),
            base=held.get("base"),
            own=tuple(held.get(f"the base of {label}", held["base"]) for label in labels) if several else (),
            seed=self.seed,
            labels=tuple(labels),
            notes=self.notes,
            grams=tuple(e.gram(name) for e in seen if e.stats is not None) if linear else (),
            fishers=tuple(e.fisher[name] for e in seen if name in e.fisher),
            order=tuple(self.labels.index(label) for label in labels),
            marks=tuple(marks[label] for label in labels if marks),
        )

    def made(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """What a plain result of models that store a weight in these is stored in."""
        return self.dtype or dtypes.get("base") or functools.reduce(torch.promote_types, dtypes.values())

    def __call__(self, s: Sources) -> Expr:
        """What these sources become."""
        step, _ = self.how[s.name]
        return get(step.method)(s, **dict(step.options))

    def about(self, s: Sources) -> str:
        """A hash of all that the result for these sources depends on."""
        exprs = [*s.marks, *(mark(e) for e in (*s.own, *([s.base] if s.base is not None else [])))]
        data = [word_sum(t) if t is not None else "" for t in (*s.grams, *s.fishers)]
        code = [chain_key((self.how[s.name][0],)), code_version("expr", "linalg", "model", "engine")]
        said = [code, s.name, s.weights, s.order, str(s.dtype), s.seed, exprs, data]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def mark(expr: Expr) -> str:
    """What an expression holds, in short."""
    return json.dumps([spec(expr), [word_sum(t) for t in tensors(expr).values()]])


def _settle(made: nn.Module, models: Sequence[nn.Module], sites: Sequence[str]) -> None:
    """Tell the merged model what its pretrained values are: the merged ones, but where a base that all models have still stands."""
    known = [m.__dict__.get("_weft_base") for m in models]
    one = known[0] is not None and all(k == known[0] for k in known)
    exprs, kept = expressions(made), True
    for name in sites:
        place, expr = places(made)[name], exprs[name]
        if one and not isinstance(expr, Dense):
            continue
        kept = False
        place.original = Original(functools.partial(_value, expr))
        place.dtype = expr.w.dtype if isinstance(expr, Dense) else place.dtype
    first_vectors(made).clear()
    if not (one and kept):
        cast(Any, made)._weft_base = None


def _value(expr: Expr) -> Tensor:
    return expr.dense().detach()


def bases_of(base: Base) -> list[nn.Module]:
    """The bases in a list: none, one for all, or one for each member."""
    return [] if base is None else [base] if isinstance(base, nn.Module) else [*base]


def named(models: Sequence[nn.Module], bases: Sequence[nn.Module] = ()) -> dict[str, nn.Module]:
    """The models by name, the one that others are compared with first."""
    start = int(len(bases) <= max(1, len(models)))  # 0 where the first is no member's
    first = {"base" if i == start else f"the base of member {i}": m for i, m in enumerate(bases, start)}
    return first | {f"member {i}": m for i, m in enumerate(models, 1)}


def _chosen(model: nn.Module, at: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """The sites, and the norms, biases and the like, that these globs match."""
    globs = [at] if isinstance(at, str) else list(at)
    loose = [n for n, t in plain_tensors(model).items() if isinstance(t, nn.Parameter) and t.numel()]
    plain = [n for n in loose if any(fits(n, g) for g in globs)]
    about = [g for g in globs if not any(fits(n, g) for n in plain) or any(fits(n, g) for n in places(model))]
    return (match(model, about) if about else []), plain
