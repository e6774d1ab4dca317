"""Run methods that choose a change of coordinates: each axis that a method goes to, from today's evidence, then all at once."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.engine.method import Method
from weft.engine.registry import get
from weft.engine.run import Change, Step, group_of
from weft.error import OptionError
from weft.expr import Expr
from weft.model import Axis, Group, Transform, axes, expressions, finite, places, transport
from weft.stats import Stats


@dataclass(frozen=True)
class Span:
    """An axis as a method sees it: the weights that write it and those that read it, with their evidence."""

    axis: Axis
    writers: Group
    readers: Group

    def columns(self, t: Float[Tensor, "n"]) -> Float[Tensor, "columns"]:
        """A value an index, for every column of a reader: query heads that share a key head have the same."""
        return t.view(self.axis.blocks, 1, -1).expand(-1, self.axis.readers[0].copies, -1).flatten()

    def indices(self, t: Float[Tensor, "columns"]) -> Float[Tensor, "n"]:
        """The mean over the columns of an index."""
        return t.view(self.axis.blocks, self.axis.readers[0].copies, -1).mean(1).flatten()

    def seen(self, what: str) -> Float[Tensor, "n"]:
        """`mean_abs` or `most` of what the readers read. Errors: OptionError without evidence; NumericError."""
        held = [getattr(e, what) for s in self.readers for e in s.evidence if getattr(e, what) is not None]
        if not held:
            want, fix = "calibration data", "pass data"
            raise OptionError("this method needs evidence", where=self.axis.name, got="none", want=want, fix=fix)
        return self.indices(finite(torch.stack(held).amax(0).double(), f"{self.axis.name}.{what}"))


def run(
    model: nn.Module,
    step: Step,
    *,
    at: str | Sequence[str] | None = None,
    stats: Stats | None = None,
    seed: int = 0,
    done: Callable[[int], None] | None = None,
) -> tuple[list[Change], list[tuple[str, str]]]:
    """Change the coordinates of every axis that the method goes to and that admits it, in place: what changed, and the fallbacks.

    `at`: globs of axis names. Errors: OptionError for a glob that no axis fits which admits it; those of the method and of
    `transport`.
    """
    method = get(step.method)
    chosen = _match(model, method, at)
    made: dict[str, Transform] = {}
    notes: list[tuple[str, str]] = []
    for axis in chosen:
        span = _span(model, axis, stats, seed)
        made[axis.name] = method(span, **dict(step.options))
        notes += [*span.writers.notes, *span.readers.notes]
        if done:
            done(1)
    held = {a.name: a for a in chosen}
    notes += transport(model, made)
    now = axes(model)
    exprs = expressions(model)
    return [_change(held[n], now[n], by, exprs) for n, by in made.items()], notes


def reach(model: nn.Module, method: str, at: str | Sequence[str] | None) -> int:
    """How many axes `run` would go to. Errors: as there."""
    return len(_match(model, get(method), at))


def _match(model: nn.Module, method: Method, at: str | Sequence[str] | None) -> list[Axis]:
    held = [a for a in axes(model).values() if a.kind in method.on and a.admits(method.moves)]
    globs = [at] if isinstance(at, str) else list(at or ["*"])
    found: dict[str, Axis] = {}
    for glob in globs:
        fits = [a for a in held if fnmatch.fnmatchcase(a.name, glob) or fnmatch.fnmatchcase(a.name, f"*.{glob}")]
        if not fits:
            kinds = ", ".join(method.on)
            want = f"a name or glob of an axis that admits {method.moves} ({kinds})"
            want = want if held else f"a model with axes of kind {kinds} that admit {method.moves}"
            where, fix = f"{method.name}: at", "weft.axes(model) lists them, and why they refuse"
            raise OptionError("no axis fits", where=where, got=glob, want=want, fix=fix)
        found |= {a.name: a for a in fits}
    return [a for a in held if a.name in found]


def _span(model: nn.Module, axis: Axis, stats: Stats | None, seed: int) -> Span:
    sites = [
        [n for n in dict.fromkeys(p.name for p in parts) if n in places(model)]
        for parts in (axis.writers, axis.readers)
    ]
    writers, readers = (group_of(model, names, stats, seed=seed) for names in sites)
    return Span(axis, writers, readers)


def _change(before: Axis, after: Axis, by: Transform, exprs: Mapping[str, Expr]) -> Change:
    """What happened to an axis; the bytes are those of the weights that write and read it."""
    names = {p.name for p in (*after.writers, *after.readers)} & set(exprs)
    what = f"{after.size} of {before.size}" if after.size != before.size else by.describe()
    return Change(
        before.name, f"{before.kind} axis of {before.size}", what, sum(exprs[n].nbytes() for n in names), None
    )
