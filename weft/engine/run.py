"""Run methods: one step or a chain on a group, on a whole model from dense evidence, or block by block behind its own errors."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.engine.method import Method
from weft.engine.registry import get
from weft.error import OptionError
from weft.expr import Expr, build, spec, stack, tensors, terms_of, total
from weft.model import Evidence, Group, Site, finite, match, places, set_expressions, site
from weft.model.blocks import block_of, blocks
from weft.progress import Progress, Silent
from weft.stats import Edges, Stats, Walker
from weft.store.files import parse_json, read_tensors, write_json, write_tensors


@dataclass(frozen=True)
class Step:
    """One method with all its options."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, method: str, **options: Any) -> Step:
        """A step with checked options. Errors: OptionError."""
        return cls(method, tuple(get(method).bind(options).items()))

    def describe(self) -> str:
        """`gptq(bits=4, group=64)`, options that differ from the defaults."""
        defaults = get(self.method).bind({})
        return f"{self.method}({', '.join(f'{k}={v}' for k, v in self.options if defaults[k] != v)})"


Chain = tuple[Step, ...]


def run(group: Group, chain: Sequence[Step]) -> list[Expr]:
    """The group's expressions after every step of the chain. The group itself is unchanged.

    A lone weight of more than `CHUNK` entries is rewritten in slices of rows if every method of the chain is rowwise.
    """
    if (
        len(group.sites) == 1
        and len(parts := list(group.site.slices())) > 1
        and all(get(s.method).rowwise for s in chain)
    ):
        if group.site.evidence:
            group.gram()  # of the whole weight, before its slices share the cache
        if any(get(s.method).whole for s in chain):
            return [stack([run(replace(group, sites=(part,)), chain)[0] for part in parts])]
        terms = terms_of(group.site.now)  # all but the base stay as they are: a slice of a trainable leaf is frozen
        bare = group.put([terms.pop("base", group.site.now)])
        made = stack([run(replace(bare, sites=(part,)), chain)[0] for part in bare.site.slices()])
        return [_with(made, terms)]
    for step in chain:
        group = group.put(_step(group, get(step.method), dict(step.options)))
    return [s.now for s in group]


def _step(group: Group, method: Method, options: dict[str, Any]) -> list[Expr]:
    if method.kind != "rewrite":
        raise OptionError(
            "this method does not rewrite weights",
            where=method.name,
            got=method.kind,
            want="a rewrite",
            fix="weft methods shows kinds",
        )
    whole = {s.name: terms_of(s.now) for s in group}
    seen = group if method.whole else group.put([whole[s.name].get("base", s.now) for s in group])
    if method.per == "input":
        made = list(method(seen, **options))
    else:
        made = [method(replace(seen, sites=(s,)), **options) for s in seen]
    if method.whole:
        return made
    rest = [{r: t for r, t in whole[s.name].items() if r != "base"} for s in group]
    return [_with(new, others) for new, others in zip(made, rest, strict=True)]


def _with(new: Expr, others: Mapping[str, Expr]) -> Expr:
    """What a method made of the base, then the weight's other terms; adapters stay, a compensation may be replaced."""
    fresh = terms_of(new)
    return total({"base": fresh["base"], **others, **fresh, **_adapters(others)})


def _adapters(terms: Mapping[str, Expr]) -> dict[str, Expr]:
    return {r: t for r, t in terms.items() if r.startswith("adapter:")}


def group_of(model: nn.Module, names: Sequence[str], stats: Stats | None, *, seed: int = 0) -> Group:
    """The group of these sites with their evidence."""
    held = stats.evidence(names) if stats is not None else {}
    return Group(tuple(site(model, n, evidence=held.get(n, ()), seed=seed) for n in names))


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
    """Relative output error against the pretrained weight: sqrt(tr(E G Eᵀ) / tr(W G Wᵀ)); None without evidence."""


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

    Errors: those of the methods; OptionError where a method needs evidence and there is none, or `at` matches nothing.
    """
    needs = {n for s in chain for n in get(s.method).needs}
    if needs and stats is None:
        raise OptionError(
            "this method needs calibration data",
            where=next(s.method for s in chain if get(s.method).needs),
            got="no data",
            want=", ".join(sorted(needs)),
            fix="pass data",
        )
    changes: list[Change] = []
    notes: list[tuple[str, str]] = []
    for names in groups(model, match(model, at), stats):
        group = group_of(model, names, stats, seed=seed)
        made = run(group, chain)
        changes += [change(s, e) for s, e in zip(group, made, strict=True)]
        set_expressions(model, dict(zip(names, made, strict=True)))
        notes += group.notes
        if step:
            step(len(names))
    return changes, notes


def change(before: Site, after: Expr) -> Change:
    """The record of one rewrite."""
    return Change(before.name, before.now.describe(), after.describe(), after.nbytes(), relative_error(before, after))


def relative_error(before: Site, after: Expr) -> float | None:
    """sqrt(tr(E G Eᵀ) / tr(W G Wᵀ)) for E = value - pretrained W, with the site's first evidence."""
    if not before.evidence:
        return None
    gram, weight = before.evidence[0].gram, before.original
    gap = after.dense().float() - weight
    return float((((gap @ gram) * gap).sum().clamp(min=0) / ((weight @ gram) * weight).sum().clamp(min=1e-20)).sqrt())


def propagate(
    model: nn.Module,
    chains: Mapping[str, Chain],
    stats: Stats,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> list[tuple[str, str]]:
    """Rewrite every site by its chain, in place, each behind the errors of what comes before it. Returns the fallbacks.

    Embeddings (and a head tied to one) come first, from dense evidence; then, block by block, each group of sites that
    read one input sees the Gram of what the compressed blocks before it feed this one, with the dense row weights; the
    head comes last.
    With a `journal` folder each stage's result is kept there, and a run that was interrupted goes on behind them.
    Errors: those of the methods; NumericError if an input is not finite.
    """
    names = list(chains)
    log = _Journal(journal, model)
    if not any(get(s.method).needs for chain in chains.values() for s in chain):
        log.stage("all", lambda: _rewrite(model, groups(model, names, stats), chains, stats, seed))
        return log.notes
    stages: dict[int | str, list[tuple[str, ...]]] = {"first": []}
    last = [g for g in groups(model, names, stats) if block_of(model, g[0]) is None and _is_head(model, g[0])]
    for g in groups(model, names, stats):
        where = block_of(model, g[0])
        if g not in last:
            stages.setdefault("first" if where is None else where, []).append(g)
    log.stage("first", lambda: _rewrite(model, stages["first"], chains, stats, seed))
    if log.replay([f"block-{i:04d}" for i in range(len(blocks(model)[1]))] + (["last"] if last else [])):
        return log.notes
    walker = Walker(model, batches)
    with (progress or Silent()).bar("compress", len(walker.blocks)) as bar:
        for i in range(len(walker.blocks)):
            log.stage(
                f"block-{i:04d}",
                lambda i=i: _behind(
                    model, stages.get(i, []), chains, stats, seed, lambda edges: walker.step(i, edges, keep=False)
                ),
            )
            walker.step(i)
            bar(1)
    if last:
        log.stage(
            "last",
            lambda: _behind(model, last, chains, stats, seed, lambda edges: [None for _ in walker.finish(edges)]),
        )
    return log.notes


def _is_head(model: nn.Module, name: str) -> bool:
    return places(model)[name].kind == "linear"


Done = tuple[dict[str, Expr], list[tuple[str, str]]]


def _rewrite(
    model: nn.Module, todo: Sequence[tuple[str, ...]], chains: Mapping[str, Chain], stats: Stats, seed: int
) -> Done:
    made: dict[str, Expr] = {}
    notes: list[tuple[str, str]] = []
    for names in todo:
        group = group_of(model, names, stats, seed=seed)
        made |= _solve(group, chains)
        notes += group.notes
    return made, notes


def _solve(group: Group, chains: Mapping[str, Chain]) -> dict[str, Expr]:
    """Sites of one group, those with the same chain together."""
    made: dict[str, Expr] = {}
    for chain in dict.fromkeys(chains[s.name] for s in group):
        part = replace(group, sites=tuple(s for s in group if chains[s.name] == chain))
        made |= dict(zip([s.name for s in part], run(part, chain), strict=True))
    return made


def _behind(
    model: nn.Module,
    todo: Sequence[tuple[str, ...]],
    chains: Mapping[str, Chain],
    stats: Stats,
    seed: int,
    walk: Callable[[Edges], Any],
) -> Done:
    """Rewrite groups from the inputs that today's model gives them."""
    made: dict[str, Expr] = {}
    notes: list[tuple[str, str]] = []
    edges = Edges(frozenset(n for names in todo for n in names))
    walk(edges)
    for names in todo:
        group = group_of(model, names, stats, seed=seed)
        group = replace(group, sites=tuple(replace(s, evidence=_seen(s, edges)) for s in group))
        made |= _solve(group, chains)
        notes += group.notes
    return made, notes


def _seen(before: Site, edges: Edges) -> tuple[Evidence, ...]:
    """The site's evidence with today's inputs and the dense row weights."""
    if before.name not in edges.of:
        return before.evidence
    sums = edges.sums[edges.of[before.name]]
    gram = finite(sums.gram, f"{before.name}.gram") / max(1, sums.tokens)
    return (Evidence(gram, before.evidence[0].weight, sums.tokens),)


class _Journal:
    """Results of finished stages on disk: each stage's tensors, then its expressions; read back by a later run."""

    def __init__(self, folder: Path | None, model: nn.Module) -> None:
        self.folder, self.model = folder, model
        self.notes: list[tuple[str, str]] = []

    def stage(self, name: str, work: Callable[[], Done]) -> None:
        """Do the work, or take its result from the journal; put the expressions in place."""
        made, notes = self._read(name) or work()
        if self.folder is not None and not (self.folder / f"{name}.json").exists():
            write_tensors(
                self.folder / f"{name}.safetensors",
                {f"{s}:{p}": t for s, e in made.items() for p, t in tensors(e).items()},
            )
            write_json(
                self.folder / f"{name}.json",
                {
                    "sites": {s: spec(e) for s, e in made.items()},
                    "notes": notes,
                    "trainable": [
                        f"{s}:{p}" for s, e in made.items() for p, t in tensors(e).items() if t.requires_grad
                    ],
                },
            )
        set_expressions(self.model, made)
        self.notes += notes

    def replay(self, names: Sequence[str]) -> bool:
        """Take all these stages from the journal, if it has every one."""
        made = [self._read(name) for name in names]
        if not all(made):
            return False
        for exprs, notes in filter(None, made):
            set_expressions(self.model, exprs)
            self.notes += notes
        return True

    def _read(self, name: str) -> Done | None:
        if self.folder is None or not (self.folder / f"{name}.json").exists():
            return None
        index = parse_json((self.folder / f"{name}.json").read_bytes(), f"{name}.json")
        held = read_tensors(self.folder / f"{name}.safetensors")
        held |= {k: nn.Parameter(held[k].clone()) for k in index["trainable"]}
        made = {s: build(tree, lambda p, s=s: held[f"{s}:{p}"]) for s, tree in index["sites"].items()}
        return made, [(w, t) for w, t in index["notes"]]


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
