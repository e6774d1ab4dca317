"""Run methods of kind recipe: which of a model's sites are rewritten by which methods, in what order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from weft.engine.recipe import At, Recipe
from weft.engine.registry import get
from weft.engine.run import Step
from weft.error import ConflictError, OptionError
from weft.model import tagged
from weft.model.axes import parts
from weft.model.blocks import blocks
from weft.model.families import Feed

Planned = tuple[Step, At | None]
"""A step and the names of its sites; of a step that has no sites None."""


@dataclass(frozen=True)
class Outline:
    """A model as a method sees it that makes a recipe: its sites, weights and vectors, and where they stand."""

    model: nn.Module
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Declared fallbacks: (where, what)."""

    @cached_property
    def sites(self) -> dict[str, int]:
        """Every site with its depth: 0 before the blocks, then the number of the block from 1, and one more behind the last.

        Errors: ConflictError for a model of several stacks of blocks.
        """
        order = {n: i for i, (n, _) in enumerate(self.model.named_modules())}
        start, known = f"{self._path}.", tagged(self.model, ("matrix", "vector"))
        inside = {n for n in known if n.startswith(start)}
        if other := [n for n in known if n not in inside and any(p.isdigit() for p in n.split("."))]:
            want, fix = (
                f"one stack of blocks ({self._path})",
                'choose sites yourself: weft.apply(model, "full", at=...)',
            )
            what, where = "this model has several stacks", type(self.model).__name__
            raise ConflictError(what, where=where, got=other[0], want=want, fix=fix)
        deep = {n: order.get(n.rpartition(".")[0], 0) > order[self._path] for n in known}
        return {
            n: int(n[len(start) :].split(".")[0]) + 1 if n in inside else (self.blocks + 1) * deep[n] for n in known
        }

    @cached_property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(blocks(self.model)[1])

    @cached_property
    def _path(self) -> str:
        return blocks(self.model)[0]

    def fed(self, *, feed: bool) -> set[str]:
        """The weights of the feed-forward parts, or of attention. Errors: ConflictError for a family that no table describes."""
        made = set[str]()
        for block, part in parts(self.model):
            if isinstance(part, Feed) == feed:
                held = (part.up, part.down, part.gate) if isinstance(part, Feed) else (part.q, part.k, part.v, part.o)
                globs = [f"{block}.{n.partition('[')[0]}.weight" for n in held if n]
                made |= {n for n in self.sites if any(fnmatchcase(n, g) for g in globs)}
        return made

    def kind(self, name: str) -> str:
        """The name of a site without the number of its block: what it shares with those of other blocks."""
        start = f"{self._path}."
        return f"{start}*.{name[len(start) :].partition('.')[2]}" if name.startswith(start) else name

    def step(self, method: str, at: Iterable[str] | None = None, **options: Any) -> Planned:
        """A step on these sites. Errors: OptionError."""
        return Step.of(method, **options), None if at is None else tuple(at)

    def fallback(self, what: str) -> None:
        """Declare that the method could not do what it says here, and what it did instead."""
        self.notes.append((type(self.model).__name__, what))


def plan(model: nn.Module, step: Step) -> tuple[Recipe, Step | None, list[tuple[str, str]]]:
    """What a method of kind recipe does with a model: the steps that change it, the optimizer that training takes, the fallbacks.

    The model stays. Errors: those of the method; OptionError for a method of another kind, for a step without sites and for two optimizers.
    """
    method = get(step.method)
    if method.kind != "recipe":
        want, fix = "a recipe", "weft methods shows kinds"
        raise OptionError("this method makes no recipe", where=method.name, got=method.kind, want=want, fix=fix)
    seen = Outline(model)
    made: list[Planned] = method(seen, **dict(step.options))
    if strange := sorted({s.method for s, _ in made} - set(method.uses)):
        got, want, fix = ", ".join(strange), ", ".join(method.uses), "name it in the recipe's uses"
        raise OptionError("a recipe's steps are not declared", where=method.name, got=got, want=want, fix=fix)
    moves = [s for s, _ in made if get(s.method).kind == "optimizer"]
    rest = [(s, at) for s, at in made if s not in moves]
    if bad := [s.method for s, at in rest if at == ()] or [s.method for s in moves[1:]]:
        want, fix = (
            "sites for every step, and one optimizer at most",
            "choose other options: fewer frozen blocks, for one",
        )
        raise OptionError("this recipe has nothing to do", where=method.name, got=bad[0], want=want, fix=fix)
    return Recipe(tuple(rest)), moves[0] if moves else None, seen.notes
