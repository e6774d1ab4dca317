"""Sums and products, the normal form, and what works on any tree: fork, spec, build."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import FormatError, ShapeError
from weft.expr.base import NODES, Expr, Promises, fields, tensors
from weft.expr.derived import Derived
from weft.expr.generated import Hadamard, Permutation
from weft.expr.nodes import Dense, Diagonal
from weft.expr.products import CACHED

SIDES = (Diagonal, Permutation, Hadamard)
"""What the normal form has at its sides: cheap on activations, and invertible where no entry is zero."""
_ROLE = re.compile(r"base|compensation|adapter:[A-Za-z0-9_-]+")


class Sum(Expr):
    """Named terms of one shape. value = base + compensation + adapter:NAME + ...

    Roles are `base`, `compensation` and `adapter:NAME`; promises belong to the terms, a sum has none of its own.
    """

    def __init__(self, terms: Mapping[str, Expr]) -> None:
        nn.Module.__init__(self)
        shapes = {t.shape for t in terms.values()}
        bad = [r for r in terms if not _ROLE.fullmatch(r)]
        if len(shapes) != 1 or bad or not terms:
            raise ShapeError(
                "these terms make no sum",
                where="Sum",
                got=", ".join(f"{r} {list(t.shape)}" for r, t in terms.items()),
                want="one shape; roles base, compensation or adapter:NAME (letters, digits, _ and -)",
                fix="rename or reshape the terms",
            )
        self.terms = nn.ModuleDict(dict(terms))
        self.shape = next(iter(shapes))

    def named(self) -> dict[str, Expr]:
        """The terms by role, in order."""
        return cast(dict[str, Expr], dict(self.terms.items()))

    def kids(self) -> Iterator[Expr]:
        yield from self.named().values()

    def dense(self) -> Float[Tensor, "m n"]:
        first, *rest = self.kids()
        value = first.dense()
        for term in rest:
            value = value + term.dense()
        return value

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        first, *rest = self.kids()
        y = first(x)
        for term in rest:
            y = y + term(x)
        return y

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        first, *rest = self.kids()
        y = first.rows(ids)
        for term in rest:
            y = y + term.rows(ids)
        return y

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        return Sum({r: t.take(rows) for r, t in self.named().items()})

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        held = [p.named() for p in parts if isinstance(p, Sum)]
        return Sum({r: stack([terms[r] for terms in held]) for r in held[0]})

    def describe(self) -> str:
        return " + ".join(t.describe() if r == "base" else f"{r}: {t.describe()}" for r, t in self.named().items())


class Product(Expr):
    """A product of expressions, applied right to left. value = factors[0] factors[1] ..."""

    def __init__(self, *factors: Expr) -> None:
        nn.Module.__init__(self)
        fits = all(a.shape[1] == b.shape[0] for a, b in itertools.pairwise(factors))
        if not factors or not fits:
            raise ShapeError(
                "these factors make no product",
                where="Product",
                got=" x ".join(str(list(f.shape)) for f in factors),
                want="the columns of each factor equal the rows of the next",
                fix="reorder or reshape the factors",
            )
        self.factors = nn.ModuleList(factors)
        self.shape = factors[0].shape[0], factors[-1].shape[1]

    def kids(self) -> Iterator[Expr]:
        yield from cast(Iterable[Expr], self.factors)

    def dense(self) -> Float[Tensor, "m n"]:
        *rest, value = (f.dense() for f in self.kids())
        for factor in reversed(rest):
            wide = torch.promote_types(factor.dtype, value.dtype)
            value = factor.to(wide) @ value.to(wide)
        return value

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        for factor in reversed(list(self.kids())):
            x = factor(x)
        return x

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        first, *rest = self.kids()
        return Product(first.take(rows), *rest)

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        return Product(stack([next(p.kids()) for p in parts]), *list(parts[0].kids())[1:])

    def promises(self) -> Promises:
        ranks = [r for f in self.kids() if (r := f.promises().rank) is not None]
        return Promises(rank=min(ranks) if ranks else None)

    def describe(self) -> str:
        return " · ".join(f"({f.describe()})" if isinstance(f, Sum) else f.describe() for f in self.kids())


@dataclass(frozen=True)
class Normal:
    """left · (base + terms) · right: what kernels, exporters and planners see."""

    left: tuple[Expr, ...]
    base: Expr
    terms: dict[str, Expr]
    right: tuple[Expr, ...]


def normal(expr: Expr) -> Normal | None:
    """The normal form, or None for a free tree (which runs dense)."""
    factors = list(expr.kids()) if isinstance(expr, Product) else [expr]
    core = [i for i, f in enumerate(factors) if not isinstance(f, SIDES)]
    if len(core) != 1:
        return None
    at = core[0]
    terms = terms_of(factors[at])
    if "base" not in terms or any(isinstance(t, Sum | Product) for t in terms.values()):
        return None
    base = terms.pop("base")
    return Normal(tuple(factors[:at]), base, terms, tuple(factors[at + 1 :]))


def terms_of(expr: Expr) -> dict[str, Expr]:
    """The named terms: a sum's own, or the expression as `base`. A sum inside a base is flattened."""
    if not isinstance(expr, Sum):
        return {"base": expr}
    terms = expr.named()
    inner = terms.get("base")
    rest = {r: t for r, t in terms.items() if r != "base"}
    if not isinstance(inner, Sum) or (held := terms_of(inner)).keys() & rest.keys():
        return terms  # one role twice: stays a free tree
    return {**held, **rest}


def total(terms: Mapping[str, Expr]) -> Expr:
    """The expression of these terms: flat, and no sum around a lone base."""
    flat = terms_of(Sum(terms)) if "base" in terms else dict(terms)
    return flat["base"] if list(flat) == ["base"] else Sum(flat)


def dense_copy(expr: Expr, dtype: torch.dtype) -> tuple[Tensor | None, list[Expr]]:
    """The sum of the frozen terms, dense, in this dtype and kept with the expression (None: there are none), and the others."""
    kept = expr.derive(f"dense {dtype}", lambda: _copy(expr, dtype))
    live = [t for t in terms_of(expr).values() if not any(t is tree for tree in kept.trees)]
    return (kept.value[0] if kept.value else None), live


def _copy(expr: Expr, dtype: torch.dtype) -> Derived:
    frozen = {r: t for r, t in terms_of(expr).items() if t.frozen()}
    if not frozen:
        return Derived((), ())
    whole = next(iter(frozen.values())) if len(frozen) == 1 else Sum(frozen)
    if isinstance(whole, Dense) and whole.w.dtype == dtype:
        return Derived(frozen.values(), (whole.w.detach(),))
    out = torch.empty(whole.shape, dtype=dtype, device=next(iter(tensors(whole).values())).device)
    for rows, part in zip(whole.row_slices(CACHED), whole.slices(CACHED), strict=True):
        out[rows] = part.dense()
    return Derived(frozen.values(), (out,))


def fork(expr: Expr) -> Expr:
    """New nodes over the same storage. Trainable tensors are copied, so training one never changes the other."""
    return build(spec(expr), {k: _own(t) for k, t in expr.state_dict(keep_vars=True).items()}.__getitem__)


def _own(t: Tensor) -> Tensor:
    return nn.Parameter(t.detach().clone()) if t.requires_grad else t.detach()


def spec(expr: Expr) -> dict[str, Any]:
    """The tree without its tensors, as JSON: node names and plain fields."""
    if isinstance(expr, Sum):
        return {"node": "Sum", "terms": {r: spec(t) for r, t in expr.named().items()}}
    if isinstance(expr, Product):
        return {"node": "Product", "factors": [spec(f) for f in expr.kids()]}
    made: dict[str, Any] = {"node": type(expr).__name__}
    for f in fields(type(expr)):
        if f.kind != "tensor":
            made[f.name] = spec(getattr(expr, f.name)) if f.kind == "child" else getattr(expr, f.name)
    return made


def build(tree: Mapping[str, Any], get: Callable[[str], Tensor], at: str = "") -> Expr:
    """The expression of a spec; `get(path)` gives each tensor. Errors: FormatError for an unknown node or field."""
    kind = tree.get("node")
    if kind == "Sum":
        return Sum({r: build(t, get, f"{at}terms.{r}.") for r, t in tree["terms"].items()})
    if kind == "Product":
        return Product(*(build(t, get, f"{at}factors.{i}.") for i, t in enumerate(tree["factors"])))
    if kind not in NODES:
        raise FormatError(
            "unknown node", where=at or "spec", got=kind, want=", ".join(sorted(NODES)), fix="use a newer weft"
        )
    cls = NODES[kind]
    plain = [f.name for f in fields(cls) if f.kind != "tensor"]
    want = {"node", *plain}
    if set(tree) | {name for name in plain if hasattr(cls, name)} != want:
        raise FormatError(
            f"{kind} has other fields",
            where=at or "spec",
            got=sorted(tree),
            want=sorted(want),
            fix="use the weft that wrote it",
        )
    values: dict[str, Any] = {}
    for f in fields(cls):
        if f.kind == "tensor":
            values[f.name] = get(f"{at}{f.name}")
        elif f.name in tree:  # what is absent, in a file of an older weft, has its default
            values[f.name] = build(tree[f.name], get, f"{at}{f.name}.") if f.kind == "child" else tree[f.name]
    return cls(**values)


def stack(parts: Sequence[Expr]) -> Expr:
    """One expression of the rows of like ones, in order; undoes `take` in slices."""
    return parts[0] if len(parts) == 1 else type(parts[0]).join(parts)
