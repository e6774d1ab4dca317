"""Merge: every sum of terms becomes one, dense or on the base's own grid; what that loses is reported by site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from weft.engine.run import Change
from weft.error import ConflictError, OptionError, WeftError, raise_all
from weft.expr import SIDES, Dense, Expr, Product, Promises, Sum, stack, terms_of, valueless
from weft.expr.weightnorm import WeightNorm
from weft.linalg.sparse import grid_of, onto
from weft.model import expressions, match, places, set_expressions

To = Literal["dense", "bf16", "grid"]


@dataclass(frozen=True)
class Merged(Change):
    """What merging did to one site. `error` is relative to the value before: ||after - before||_F / ||before||_F."""

    lost: tuple[str, ...] = ()
    """The base term's promises that the result does not keep."""


class Merges(list[Merged]):
    """What merging did, site by site. It holds the terms that were folded, so that `undo` can bring them back, to the bit."""

    def __init__(self, model: nn.Module, sites: Iterable[Merged], before: Mapping[str, Expr]) -> None:
        super().__init__(sites)
        self._model, self._before = model, dict(before)
        self._after = {n: expressions(model)[n] for n in before}

    def undo(self) -> None:
        """Give the model the terms that it had, in place. Errors: ConflictError for weights that were rewritten since."""
        now = expressions(self._model)
        if moved := [n for n, e in self._after.items() if now[n] is not e]:
            got, want = f"{len(moved)} other expressions", "those that merging made"
            fix = "merge last, or keep a weft.fork(model) from before"
            raise ConflictError("this merge cannot be undone", where=moved[0], got=got, want=want, fix=fix)
        set_expressions(self._model, self._before)


def merge(model: nn.Module, *, to: To, at: str | Sequence[str] = "*") -> Merges:
    """Fold all terms of every sum that `at` matches into one, in place. Sites of one term stay.

    Errors, before anything changes: OptionError for another `to`; ConflictError naming every site without a grid,
    or with a term that depends on the input.
    """
    if to not in ("dense", "bf16", "grid"):
        want = "dense, bf16 or grid"
        raise OptionError("merge has other targets", where="to", got=to, want=want, fix="choose one of these")
    held = {
        n: e
        for n, e in expressions(model).items()
        if n in match(model, at) and isinstance(e, Sum | Product | WeightNorm)
    }
    raise_all(valueless(held))
    if to == "grid":
        raise_all([p for n, e in held.items() if (p := _refusal(n, e))])
    made: list[Merged] = []
    for name, before in held.items():
        dtype = torch.bfloat16 if to == "bf16" else places(model)[name].dtype
        after = regrid(before) if to == "grid" else densify(before, dtype)
        made.append(_record(name, before, after))
        set_expressions(model, {name: after})
    return Merges(model, made, held)


def densify(expr: Expr, dtype: torch.dtype) -> Dense:
    """The value as one plain matrix."""
    return Dense(torch.cat([part.dense().detach().to(dtype) for part in expr.slices()]))


def regrid(expr: Expr) -> Expr:
    """The value on the base term's grid, with its group and zero pattern: one rounding. A value on the grid stays.

    Each group keeps its scale and zero point or takes newly fitted ones, whichever errs less.
    Errors: ConflictError without a grid.
    """
    if problem := _refusal("expression", expr):
        raise problem
    return stack([onto(_base(part), part.dense().detach().float()) for part in expr.slices()])


def _refusal(name: str, expr: Expr) -> WeftError | None:
    base = _base(expr)
    if grid_of(base) is not None:
        return None
    return ConflictError(
        "this weight cannot be merged onto a grid",
        where=name,
        got=base.describe(),
        want="a quantized base term",
        fix="merge it to dense, or quantize it first",
    )


def _base(expr: Expr) -> Expr:
    """The base term: of a weight with a magnitude that of its direction, of one between factors its own."""
    if isinstance(expr, WeightNorm):
        return _base(expr.v)
    if isinstance(expr, Product) and len(inner := [f for f in expr.acting() if not isinstance(f, SIDES)]) == 1:
        return _base(inner[0])
    base = terms_of(expr).get("base", expr)
    return base if base is expr else _base(base)


def _record(name: str, before: Expr, after: Expr) -> Merged:
    gap, size = 0.0, 0.0
    for old, new in zip(before.slices(), after.slices(), strict=True):
        value = old.dense().detach().double()
        gap += float((new.dense().double() - value).square().sum())
        size += float(value.square().sum())
    kept, had = after.promises(), _base(before).promises()
    return Merged(
        name, before.describe(), after.describe(), after.nbytes(), (gap / max(size, 1e-300)) ** 0.5, _lost(had, kept)
    )


def _lost(had: Promises, kept: Promises) -> tuple[str, ...]:
    words = {
        "zeros": "zeros",
        "nm": f"{':'.join(map(str, had.nm or ()))} pattern",
        "rank": f"rank {had.rank}",
        "levels": f"{had.levels} levels",
    }
    return tuple(
        text for field, text in words.items() if getattr(had, field) and getattr(kept, field) != getattr(had, field)
    )


__all__ = ["Merged", "Merges", "densify", "merge", "regrid"]
