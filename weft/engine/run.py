"""Run methods: one step or a chain on a group, or on a whole model from dense evidence."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from weft.engine.method import REWRITES, Method, Need
from weft.engine.registry import get
from weft.error import ConflictError, OptionError, raise_all
from weft.expr import Expr, stack, terms_of, total, valueless
from weft.linalg.sparse import evened
from weft.model import MATRIX, Group, Site, match, places, put, refusals, set_taps, site, tagged
from weft.stats import Stats, readers


@dataclass(frozen=True)
class Step:
    """One method with all its options."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, **options: Any) -> Step:
        """A step with checked options. Errors: OptionError."""
        return cls(method, tuple(get(method).bind(options).items()))

    @property
    def needs(self) -> frozenset[Need]:
        """The evidence that it needs."""
        return get(self.method).asks(dict(self.options))

    def describe(self) -> str:
        """`gptq(bits=4, group=64)`, options that differ from the defaults."""
        defaults = get(self.method).bind({})
        return f"{self.method}({', '.join(f'{k}={v}' for k, v in self.options if defaults[k] != v)})"


Chain = tuple[Step, ...]


def run(group: Group, chain: Sequence[Step]) -> list[Expr]:
    """The group's expressions after every step of the chain. Errors: OptionError for a chain that changes more than these."""
    if tapping := [s.method for s in chain if get(s.method).taps]:
        want, fix = "rewrites of weights alone", "put taps on with weft.apply, then go on"
        raise OptionError("this chain puts taps on inputs", where="chain", got=", ".join(tapping), want=want, fix=fix)
    return [s.now for s in rewritten(group, chain)]


def rewritten(group: Group, chain: Sequence[Step]) -> Group:
    """The group after every step of the chain, with its taps. The group itself is unchanged.

    A lone weight of more than `CHUNK` entries is rewritten in slices of rows if every method of the chain is rowwise.
    A base with zeros that holds no expression of what is kept, such as a sparse delta, becomes one that does.
    """
    group = group.put([_evened(s.now) for s in group])
    if (
        len(group.sites) == 1
        and len(parts := list(group.site.slices())) > 1
        and all(get(s.method).rowwise for s in chain)
    ):
        if group.site.evidence:
            group.gram()  # of the whole weight, before its slices share the cache
        if any(get(s.method).whole for s in chain):
            return group.put([stack([run(replace(group, sites=(part,)), chain)[0] for part in parts])])
        terms = terms_of(group.site.now)  # all but the base stay as they are: a slice of a trainable leaf is frozen
        bare = group.put([terms.pop("base", group.site.now)])
        made = stack([run(replace(bare, sites=(part,)), chain)[0] for part in bare.site.slices()])
        return group.put([_with(made, terms, group.name)])
    for step in chain:
        group = _step(group, get(step.method), dict(step.options))
    return group


def _evened(now: Expr) -> Expr:
    terms = terms_of(now)
    if "base" not in terms or (made := evened(terms["base"])) is terms["base"]:
        return now
    return total({**terms, "base": made})


def _step(group: Group, method: Method, options: dict[str, Any]) -> Group:
    if method.kind not in REWRITES:
        raise OptionError(
            "this method does not rewrite weights",
            where=method.name,
            got=method.kind,
            want="a rewrite",
            fix="weft methods shows kinds",
        )
    whole = {s.name: terms_of(s.now) for s in group}
    seen = group if method.whole else replace(group, sites=tuple(_bare(s, whole[s.name]) for s in group))
    try:
        if method.taps:
            after: Group = method(seen, **options)
        elif method.per == "input":
            after = group.put(method(seen, **options))
        else:
            after = group.put([method(replace(seen, sites=(s,)), **options) for s in seen])
    except ConflictError:  # a term does not know its site
        raise_all(valueless({s.name: s.now for s in seen}))
        raise
    if method.whole:
        return after
    rest = [{r: t for r, t in whole[s.name].items() if r != "base"} for s in group]
    made = [_with(s.now, others, s.name) for s, others in zip(after, rest, strict=True)]
    return replace(
        after, sites=tuple(replace(s, now=e, beside=None, adapters={}) for s, e in zip(after, made, strict=True))
    )


def _bare(site: Site, terms: Mapping[str, Expr]) -> Site:
    """A site with its base alone, and what stands beside it."""
    if "base" not in terms:
        return site
    adapters = {r: t for r, t in terms.items() if r.startswith("adapter:")}
    return replace(site, now=terms["base"], beside=terms.get("compensation"), adapters=adapters)


def _with(new: Expr, others: Mapping[str, Expr], where: str) -> Expr:
    """What a method made of the base, then the weight's other terms; a compensation may be replaced, an adapter may not."""
    fresh = terms_of(new)
    if twice := [r for r in fresh if r.startswith("adapter:") and r in others]:
        raise ConflictError(
            "this weight has an adapter of that name",
            where=where,
            got=twice[0],
            want="a new name",
            fix="give another name, or merge the first",
        )
    return total({"base": fresh["base"], **others, **fresh})


def group_of(
    model: nn.Module,
    names: Sequence[str],
    stats: Stats | None,
    *,
    seed: int = 0,
    tags: Mapping[str, frozenset[str]] | None = None,
) -> Group:
    """The group of these sites with their evidence, and their tags."""
    known = places(model)
    held = stats.evidence([n for n in names if n in known]) if stats is not None else {}
    given = tags or {}
    return Group(
        tuple(site(model, n, evidence=held.get(n, ()), seed=seed, tags=given.get(n, frozenset())) for n in names)
    )


def groups(model: nn.Module, names: Sequence[str], stats: Stats | None) -> list[tuple[str, ...]]:
    """These sites by the input they read, in the order of the model's computation; one by one where that is unknown."""
    wanted = set(names)
    if stats is None:
        return [(n,) for n in names]
    if unknown := wanted - {n for group in stats.groups for n in group}:
        raise OptionError(
            "the evidence does not know these sites",
            where="stats",
            got=sorted(unknown)[:5],
            want="evidence of this model",
            fix="collect it again",
        )
    return [g for group in stats.groups if (g := tuple(n for n in group if n in wanted))]


@dataclass(frozen=True)
class Change:
    """What a run did to one site."""

    name: str
    before: str
    after: str
    nbytes: int
    error: float | None
    """Relative output error against the pretrained weight: sqrt(tr(E G Eᵀ) / tr(W G Wᵀ)); None without evidence, or a value."""


class Changes(list[Change]):
    """What a method did, site by site, its declared fallbacks: (where, what), and the optimizer that a recipe is to be trained by."""

    def __init__(
        self,
        changes: Sequence[Change] = (),
        fallbacks: Sequence[tuple[str, str]] = (),
        optimizer: Step | None = None,
    ) -> None:
        super().__init__(changes)
        self.fallbacks, self.optimizer = list(fallbacks), optimizer


def reach(model: nn.Module, method: str, at: str | Sequence[str] | None = None) -> list[str]:
    """The sites that a rewrite goes to: of those that it is for, the ones that `at` matches.

    Without `at` all; adapters and taps that are for weights of every kind, and relax methods, go to `all-linear`. Errors: those of `match`.
    """
    chosen = get(method)
    linear = chosen.taps or chosen.kind == "relax" or (chosen.verb == "adapt" and not chosen.on)
    return match(model, at if at is not None else "all-linear" if linear else "*", chosen.sites)


def apply(
    model: nn.Module,
    chain: Sequence[Step],
    *,
    at: str | Sequence[str] = "*",
    stats: Stats | None = None,
    seed: int = 0,
    step: Callable[[int], None] | None = None,
) -> tuple[list[Change], list[tuple[str, str]]]:
    """Rewrite the sites that `at` matches, in place, from dense evidence. Returns what changed and the declared fallbacks.

    Errors: those of the methods; OptionError where a method needs evidence and there is none, `at` matches nothing, or the steps
    are for other sites.
    """
    needs = {n for s in chain for n in s.needs}
    if needs and stats is None:
        raise OptionError(
            "this method needs calibration data",
            where=next(s.method for s in chain if s.needs),
            got="no data",
            want=", ".join(sorted(needs)),
            fix="pass data",
        )
    changes: list[Change] = []
    notes: list[tuple[str, str]] = []
    on, taps = _on(chain), any(get(s.method).taps for s in chain)
    tags, chosen, known = tagged(model, on), match(model, at, on), places(model)
    weights = [n for n in chosen if n in known]
    if taps:
        raise_all(refusals(model, weights))
    alike = _sharing(model, weights, notes) if taps and stats is None else groups(model, weights, stats)
    for names in [*alike, *((n,) for n in chosen if n not in known)]:
        group = group_of(model, names, stats, seed=seed, tags=tags)
        after = rewritten(group, chain)
        changes += [change(s, made) for s, made in zip(group, after, strict=True)]
        put(model, after)
        if taps:
            set_taps(model, {s.name: s.tap for s in after})
        notes += group.notes
        if step:
            step(len(names))
    return changes, notes


def _on(chain: Sequence[Step]) -> tuple[str, ...]:
    """The tags that every step is for. Errors: OptionError if they differ."""
    kinds = {s.method: get(s.method).sites for s in chain}
    if len(set(kinds.values())) > 1:
        got = "; ".join(f"{n}: {', '.join(on)}" for n, on in kinds.items())
        want, fix = "steps for the same sites", "apply one method after the other"
        raise OptionError("these steps go to other sites", where="chain", got=got, want=want, fix=fix)
    return next(iter(kinds.values()), MATRIX)


def _sharing(model: nn.Module, names: Sequence[str], notes: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """These sites by the input they read, as one forward pass shows it; one by one, which is declared, where none does."""
    found = readers(model)
    if found is None:
        notes.append((type(model).__name__, "which sites share an input is not known: each has a tap of its own"))
        return [(n,) for n in names]
    together = [g for group in found if (g := tuple(n for n in group if n in set(names)))]
    seen = {n for g in together for n in g}
    return together + [(n,) for n in names if n not in seen]


def change(before: Site, after: Site) -> Change:
    """The record of one rewrite."""
    error = relative_error(after, after.now)
    return Change(before.name, before.describe(), after.describe(), after.now.nbytes(), error)


def relative_error(before: Site, after: Expr) -> float | None:
    """sqrt(tr(E G Eᵀ) / tr(W G Wᵀ)) for E = value - pretrained W, with the site's first evidence; None without, or without a value."""
    if not before.evidence or not after.is_matrix:
        return None
    gram, missed, whole = before.evidence[0].gram, 0.0, 0.0
    for part, expr in zip(before.slices(), after.slices(), strict=True):
        weight = part.original
        gap = expr.dense().detach().float() - weight
        missed += float(((gap @ gram) * gap).sum())
        whole += float(((weight @ gram) * weight).sum())
    return float((max(missed, 0.0) / max(whole, 1e-20)) ** 0.5)


@functools.cache
def code_version(*more: str) -> str:
    """Hash of the code that results depend on: the algebra, the solvers, the evidence and the engine, and `more` folders."""
    root = Path(__file__).parent.parent
    word = hashlib.blake2b(digest_size=8)
    for folder in ("grid", "expr", "linalg", "model", "stats", "engine", *more):
        for path in sorted((root / folder).glob("*.py")):
            word.update(path.read_bytes())
    return word.hexdigest()


def chain_key(chain: Chain) -> str:
    """Hash of a chain: its steps, their options and their methods' files."""
    steps = [[s.method, dict(s.options), get(s.method).fingerprint()] for s in chain]
    return hashlib.blake2b(json.dumps(steps, sort_keys=True).encode(), digest_size=8).hexdigest()
