"""Cosine coefficients whose places move while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.error import ConflictError
from weft.expr import Basis, Expr
from weft.expr.cosines import Cosines, waves
from weft.learn.schedule import Rewrites, Schedule, Trained

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="schedule", rows="P419", paper="2502.06820")
def relocate(
    steps: int,
    *,
    until: Annotated[float, Field(gt=0, le=1, description="share of the steps in which places move")] = 0.5,
    every: Annotated[int, Field(ge=1, description="steps from one move to the next")] = 1,
    by: Annotated[float, Field(gt=0, le=1e3, description="places that a coefficient moves, root mean square")] = 1.0,
) -> Schedule:
    """Move the places (p, q) of `loca`'s coefficients against dL/dp = c (z[p + 1, q] - z[p - 1, q]) / 2, and so q, with z the cosine
    transform of the weight's gradient; after `until` of the steps they stay.

    Places are kept with fractions and rounded where they are used. Coefficients train all along. Departures: steps are scaled to a root
    mean square of `by` for each weight, because derivatives have no scale of their own, and there is no other learning rate for them; the
    paper trains coefficients and places in turns.
    """
    return _Relocate(int(until * steps), every, by)


class _Relocate(Schedule):
    takes: ClassVar[tuple[type[Expr], ...]] = (Cosines, Basis)
    adds = "loca"

    def __init__(self, until: int, every: int, by: float) -> None:
        self.until, self.every, self.by = until, every, by

    def begin(self, held: Sequence[Trained]) -> Rewrites:
        return {at.name: _placed(at) for at in held}

    def watches(self, step: int) -> bool:
        return step <= self.until and step % self.every == 0

    def see(self, at: Trained, gradient: Float[Tensor, "m n"], step: int) -> None:
        term = at.term
        if isinstance(term, Cosines):
            p, q, c = term.p.long(), term.q.long(), 2 * term.scale * term.c.detach().float()
            across, down = gradient @ _wave(q, term.n), gradient.T @ _wave(p, term.m)
            at.add("slope", torch.stack([c * _slope(across, p, term.m), c * _slope(down, q, term.n)]))

    def after(self, step: int, held: Sequence[Trained]) -> Rewrites:
        return {at.name: self._moved(at) for at in held if "slope" in at.notes} if self.watches(step) else {}

    def _moved(self, at: Trained) -> Expr:
        term, slope = at.term, at.notes.pop("slope")
        if not isinstance(term, Cosines):
            return term
        size, most = slope.square().mean().sqrt(), slope.new_tensor([[term.m - 1.0], [term.n - 1.0]])
        here = at.notes.get("places", torch.stack([term.p, term.q]).float())
        at.notes["places"] = (here - self.by * slope / size if float(size) else here).clamp(min=0).minimum(most)
        p, q = at.notes["places"].round().int()
        return term.rebuild(p=p, q=q)


def _placed(at: Trained) -> Expr:
    """The term with its places as numbers. Errors: ConflictError for another basis than cosines."""
    if not isinstance(at.term, Basis):
        return at.term
    if at.term.kind != "cosine":
        got, want, fix = at.term.describe(), "a cosine basis", "add one with weft.apply(model, 'loca')"
        raise ConflictError("these coefficients have no places that move", where=at.name, got=got, want=want, fix=fix)
    b = at.term
    return Cosines(b.c, *b.frequencies(), b.m, b.n, b.scale)


def _wave(at: Int[Tensor, "k"], size: int) -> Float[Tensor, "size k"]:
    return waves(at, size).float()


def _slope(of: Float[Tensor, "size k"], at: Int[Tensor, "k"], size: int) -> Float[Tensor, "k"]:
    """Half the difference of the products with the waves on either side."""
    return (of * (_wave(at + 1, size) - _wave(at - 1, size))).sum(0) / 2


@relocate.claim("gains at least what as many coefficients gain at places that stay")
def claim(lab: Lab) -> Claim:
    adapter = ("loca", {"count": 1000})
    return lab.only("ref-lm").tune(ours=[adapter, ("relocate", {})], baseline=[adapter], share=1.0)
