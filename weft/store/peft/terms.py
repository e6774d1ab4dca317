"""What the types have in common whose layers add a term to a weight: one a site, of one form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from weft.error import WeftError
from weft.expr import Expr, terms_of, total
from weft.expr.gated import Gated, settled
from weft.expr.weightnorm import WeightNorm
from weft.model import expressions, name_of, places
from weft.store.peft.kind import Found, Piece, Written
from weft.store.peft.layers import Layers
from weft.store.peft.settings import key

Form = TypeVar("Form")


class Terms(Layers, Generic[Form]):
    """Adapters that add a term to each weight. What PEFT's form of a term is, `form` says."""

    order = 0
    several: ClassVar[bool] = False
    """Whether one folder can hold the sum of several adapters."""
    want: ClassVar[str]
    """The terms that it holds, in words."""

    @abstractmethod
    def form(self, term: Expr) -> Form | None:
        """A term as PEFT has it; None for any other."""

    def find(self, model: nn.Module, only: str | None) -> Found:
        found = Found()
        for site, expr in expressions(model).items():
            terms, magnitude, rest = opened(expr, only)
            found.rest[site] = rest
            if terms:
                found.pieces[site] = Piece(places(model)[site], terms, magnitude)
        return found

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        problems: list[WeftError] = []
        for site, piece in found.pieces.items():
            problems += self.unfit(site, piece.place)
            others = {role: t for role, t in piece.terms.items() if self.form(t) is None}
            problems += [self.no(site, f"{role} is {t.describe()}", self.want) for role, t in others.items()]
            if piece.magnitude is not None and not self.several:
                problems.append(self.no(site, "rows of given lengths (norm)", self.want))
            if len(piece.terms) > 1 and not self.several:
                got, fix = f"{len(piece.terms)} adapters", 'export one of them: adapter="NAME"'
                problems.append(self.no(site, got, "one", fix))
        return problems

    def strange(self, found: Found) -> int:
        return sum(self.form(t) is None for piece in found.pieces.values() for t in piece.terms.values())


class Single(Terms[Form]):
    """Adapters of which one term says all of its layer's tensors."""

    @abstractmethod
    def content(self, forms: Mapping[str, Form]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """By path each layer's tensors, and the settings. Errors: ConflictError for what one folder cannot say."""

    def write(self, model: nn.Module, found: Found) -> Written:
        terms = {piece.place.modules[0]: next(iter(piece.terms.values())) for piece in found.pieces.values()}
        forms = {path: form for path, t in terms.items() if (form := self.form(t)) is not None}
        held, settings = self.content(forms)
        tensors = {key(path, part): t.detach() for path, own in held.items() for part, t in own.items()}
        shared = settings.pop("shared", {})
        return Written({**tensors, **shared}, {**self.targets(model, list(forms)), **settings})


def opened(expr: Expr, only: str | None = None) -> tuple[dict[str, Expr], Tensor | None, Expr]:
    """The adapter terms of a weight by role, the lengths of its rows where these are apart, and the rest.

    At their strengths; those of one adapter at full strength.
    """
    if isinstance(expr, WeightNorm):
        names = {name for role in terms_of(expr.v) if (name := name_of(role)) is not None}
        if not expr.on and only not in names:
            return opened(expr.v, only)
        held, _, rest = opened(expr.v, only)
        if not held:
            return {}, None, expr
        return (held, expr.g, rest) if len(names) == 1 else ({next(iter(held)): expr}, None, rest)
    terms = terms_of(expr)
    if only is not None and isinstance(base := terms.get("base"), WeightNorm) and only not in map(name_of, terms):
        return opened(base, only)
    mine = {r: t for r, t in terms.items() if name_of(r) is not None}
    rest = total({r: t for r, t in terms.items() if r not in mine}) if mine else expr
    if only is None:
        return {r: _plain(settled(t)) for r, t in mine.items()}, None, rest
    return (
        {r: settled(t.kept if isinstance(t, Gated) else t) for r, t in mine.items() if name_of(r) == only},
        None,
        rest,
    )


def _plain(term: Expr) -> Expr:
    """The term without a gate that lets all of it through."""
    return term.kept if isinstance(term, Gated) and float(term.g) == 1 else term
