"""Compress a whole model block by block, each behind the errors of those before it, with a journal to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.engine.run import Chain, group_of, groups, run
from weft.error import WeftError
from weft.expr import Expr, build, spec, tensors
from weft.memory import release
from weft.model import Evidence, Group, Site, finite, places, set_expressions
from weft.model.blocks import block_of, blocks
from weft.progress import Progress, Silent
from weft.stats import Edges, Stats, Walker
from weft.store.files import read_json, write_json
from weft.store.tensors import read_tensors, write_tensors


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
    if not any(s.needs for chain in chains.values() for s in chain):
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
    release()
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
            release()
            bar(1)
    if last:
        log.stage(
            "last",
            lambda: _behind(model, last, chains, stats, seed, lambda edges: [None for _ in walker.finish(edges)]),
        )
    return log.notes


def _is_head(model: nn.Module, name: str) -> bool:
    return places(model)[name].kind != "embedding"


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
            made, _ = self._read(name) or (made, notes)  # mapped from disk, so that a model takes no memory of its own
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
        try:
            index = read_json(self.folder / f"{name}.json")
            held = read_tensors(self.folder / f"{name}.safetensors")
        except WeftError:  # damaged: made again
            (self.folder / f"{name}.json").unlink()
            return None
        held |= {k: nn.Parameter(held[k].clone()) for k in index["trainable"]}
        made = {s: build(tree, lambda p, s=s: held[f"{s}:{p}"]) for s, tree in index["sites"].items()}
        return made, [(w, t) for w, t in index["notes"]]
