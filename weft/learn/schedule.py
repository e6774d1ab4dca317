"""Schedules: what rewrites terms while they train, and what it knows of them and of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import Expr, SparseDelta
from weft.linalg.masks import largest


@dataclass
class Trained:
    """A term that trains, as a schedule sees it: the weight that it stands beside, what it is today, and what is known of it."""

    name: str
    """Its site and its role."""
    role: str
    term: Expr
    beside: Mapping[str, Expr]
    """Base and compensation of its weight."""
    parts: Mapping[str, Expr] = field(default_factory=dict[str, Expr])
    """What stands in the term's place by role: itself, and what a schedule split off from it."""
    notes: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What the schedule keeps between steps; checkpoints hold it."""
    fresh: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """What this process noted in this step."""

    @property
    def values(self) -> nn.Parameter:
        """The one tensor of the term that trains."""
        return next(p for p in self.term.parameters() if p.requires_grad)

    def entries(self) -> Int[Tensor, "k"]:
        """The places of the values in the weight, row by row. Errors: ConflictError for a term that is not sparse."""
        if not isinstance(self.term, SparseDelta):
            got, want, fix = self.term.describe(), "a sparse term", "add one: weft.apply(model, 'sparse')"
            raise ConflictError("this term has no places", where=self.name, got=got, want=want, fix=fix)
        return self.term.entries()

    def sparse(self, at: Int[Tensor, "k"], values: Float[Tensor, "k"], *, trains: bool = True) -> SparseDelta:
        """A term of the weight's shape with these values at these places, which come in any order."""
        (m, n), order = self.term.shape, at.argsort()
        rows, columns = at[order] // n, (at[order] % n).int()
        held = nn.Parameter(values.detach()[order].clone(), requires_grad=trains)
        return SparseDelta(rows.bincount(minlength=m).int(), columns, held, n)

    def moved(self, at: Int[Tensor, "k"]) -> SparseDelta:
        """A sparse term at these places: where it had a value it keeps it, and elsewhere it is zero."""
        held, values = self.entries(), self.values.new_zeros(len(at))
        stays = torch.isin(at, held)
        values[stays] = self.values.detach()[torch.searchsorted(held, at[stays])]
        return self.sparse(at, values)

    def weight(self) -> Float[Tensor, "m n"]:
        """The value of what it stands beside, in float32."""
        with torch.no_grad():
            value = self.values.new_zeros(self.term.shape, dtype=torch.float32)
            for term in self.beside.values():
                value = value + term.dense().float()
        return value

    def open(self, score: Float[Tensor, "m n"]) -> Float[Tensor, "m*n"]:
        """A score of every entry, row by row; minus infinity for those that a pattern of zeros in the base leaves out."""
        kept = self.beside["base"].mask() if "base" in self.beside else None
        return (score if kept is None else score.masked_fill(~kept, -torch.inf)).flatten()

    def nominate(self, score: Float[Tensor, "m n"], count: int) -> None:
        """Note the places of the highest scores under `nominated`, together with those of the other parts of the batch and processes."""
        best = largest(self.open(score), count)
        self.fresh["nominated"] = torch.cat([self.fresh.get("nominated", best[:0]), best]).unique()

    def measure(self, gradient: Float[Tensor, "m n"]) -> None:
        """Add up the gradient at the places that were nominated."""
        if "nominated" in self.notes:
            self.add("sum", gradient.flatten()[self.notes["nominated"]])

    def measured(self) -> tuple[Int[Tensor, "k"], Float[Tensor, "k"]]:
        """The places that were nominated and their sums, which are forgotten; none of a term that was not used, as of an expert may be."""
        places, sums = (self.notes.pop(note, self.values.new_zeros(0)) for note in ("nominated", "sum"))
        return (places.long(), sums) if len(places) == len(sums) else (places[:0].long(), sums[:0])

    def add(self, note: str, value: Tensor) -> None:
        """Add to a note. Over the parts of a batch and the processes it becomes what the gradient is over them."""
        held = self.fresh.get(note)
        self.fresh[note] = value if held is None else held + value


Rewrites = Mapping[str, Expr]
"""New terms by name, in which one tensor trains. Of a `Sum` all terms take the place of the old one, one of them under its role."""


class Schedule:
    """What a method of kind schedule makes for a run. What it has to remember from step to step are notes of its terms."""

    takes: ClassVar[tuple[type[Expr], ...]] = (SparseDelta,)
    """The nodes that it rewrites."""
    adds: ClassVar[str] = "sparse"
    """The method that adds such terms."""

    def begin(self, held: Sequence[Trained]) -> Rewrites:
        """What stands there before the first step."""
        return {}

    def watches(self, step: int) -> bool:
        """Whether it is to see gradients in this step; the first one is 1."""
        return False

    def see(self, at: Trained, gradient: Float[Tensor, "m n"], step: int) -> None:
        """Note what is of use of the gradient of a term's value over one part of a batch, which is gone afterwards."""

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        """What is rewritten after this step of the optimizer; `values` still have their gradients."""
        return {}


Make = Callable[[int], Schedule]
"""`(steps of the run) -> schedule`"""


def untrained(held: Sequence[Trained]) -> None:
    """Errors: ConflictError for terms that are more than zeros, where a schedule begins anew."""
    problems: list[WeftError] = []
    for at in held:
        if bool(at.values.any()):
            got, want, fix = "a term that was trained", "one of zeros", "merge it (weft.merge), and add another"
            problems.append(ConflictError("this term is begun already", where=at.name, got=got, want=want, fix=fix))
    raise_all(problems)


def at_least(steps: int, least: int, where: str) -> None:
    """Errors: OptionError for a run that is too short to rewrite anything."""
    if steps < least:
        fix = "train for more steps"
        raise OptionError(
            "this run is too short for the schedule", where=where, got=steps, want=f"{least} steps", fix=fix
        )
