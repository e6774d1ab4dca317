"""Sums and products, the normal form, and what works on any tree: fork, spec, build."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import ConflictError, FormatError, ShapeError, WeftError
from weft.expr.base import NODES, Expr, Promises, identity, own, tensors, written
from weft.expr.cayley import Cayley
from weft.expr.derived import Derived
from weft.expr.fields import Field, defaults, fields
from weft.expr.generated import Hadamard, Permutation
from weft.expr.named import Named
from weft.expr.nodes import Dense, Diagonal
from weft.expr.products import CACHED

SIDES = (Diagonal, Permutation, Hadamard, Cayley)
"""What the normal form has at its sides: cheap on activations, and invertible where no entry is zero."""
_ROLE = re.compile(r"base|compensation|adapter:[A-Za-z0-9_-]+")


class Sum(Expr):
    """Named terms of one shape. value = base + compensation + adapter:NAME + ...

    Roles are `base`, `compensation` and `adapter:NAME`; promises belong to the terms, a sum has none of its own.
    """

    terms: Mapping[str, Expr]

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return next(self.kids()).shape

    def check(self) -> None:
        if len({t.shape for t in self.kids()}) != 1 or not all(map(_ROLE.fullmatch, self.terms)):
            raise ShapeError(
                "these terms make no sum",
                where="Sum.terms",
                got=", ".join(f"{r} {list(t.shape)}" for r, t in self.terms.items()),
                want="one shape; roles base, compensation or adapter:NAME (letters, digits, _ and -)",
                fix="rename or reshape the terms",
            )

    def named(self) -> dict[str, Expr]:
        """The terms by role, in order."""
        return dict(self.terms.items())

    def kids(self) -> Iterator[Expr]:
        yield from self.terms.values()

    def dense(self) -> Float[Tensor, "m n"]:
        if not self.is_matrix:
            problem = no_value("Sum", self.named())
            raise problem
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

    def mapped(self, dim: int, values: Callable[[Tensor], Tensor], beside: Callable[[Expr], Expr]) -> Expr:
        return Sum({r: t.mapped(dim, values, beside) for r, t in self.named().items()})

    def describe(self) -> str:
        return " + ".join(t.describe() if r == "base" else f"{r}: {t.describe()}" for r, t in self.named().items())


class Product(Expr):
    """A product of expressions, applied right to left. value = factors[0] factors[1] ..."""

    factors: Sequence[Expr]

    def __init__(self, *factors: Expr, **named: Any) -> None:
        super().__init__(**(named or {"factors": factors}))

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def check(self) -> None:
        if not all(a.shape[1] == b.shape[0] for a, b in itertools.pairwise(self.kids())):
            raise ShapeError(
                "these factors make no product",
                where="Product.factors",
                got=" x ".join(str(list(f.shape)) for f in self.kids()),
                want="the columns of each factor equal the rows of the next",
                fix="reorder or reshape the factors",
            )

    def kids(self) -> Iterator[Expr]:
        yield from self.factors

    def acting(self) -> list[Expr]:
        """The factors, without names and without those that are off."""
        return [f.kept if isinstance(f, Named) else f for f in self.kids() if not isinstance(f, Named) or f.on]

    def dense(self) -> Float[Tensor, "m n"]:
        core, right = self.acting(), list[Cayley | Diagonal]()
        while len(core) > 1 and isinstance(last := core[-1], Cayley | Diagonal):
            right.append(last)
            core.pop()
        value = core.pop().dense()
        for factor in reversed(core):
            value = _times(factor, value)
        for side in reversed(right):  # last, so that a turn by nothing changes no bit
            value = side.turned(value) if isinstance(side, Cayley) else _scaled(value, side.d)
        return value

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        for factor in reversed(self.acting()):
            x = factor(x)
        return x

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        first, *rest = self.acting()
        return Product(first.take(rows), *rest)

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        return Product(stack([next(p.kids()) for p in parts]), *list(parts[0].kids())[1:])

    def promises(self) -> Promises:
        ranks = [r for f in self.acting() if (r := f.promises().rank) is not None]
        return Promises(rank=min(ranks) if ranks else None)

    def describe(self) -> str:
        return " · ".join(f"({f.describe()})" if isinstance(f, Sum) else f.describe() for f in self.kids())


def _times(factor: Expr, value: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """The product of a factor's value and a matrix; a diagonal scales rows."""
    if isinstance(factor, Diagonal):
        return _scaled(value, factor.d[:, None])
    left = factor.dense()
    wide = torch.promote_types(left.dtype, value.dtype)
    return left.to(wide) @ value.to(wide)


def _scaled(value: Float[Tensor, "m n"], d: Tensor) -> Float[Tensor, "m n"]:
    """Each entry times its row's or column's number, in float32 at least."""
    wide = torch.promote_types(torch.promote_types(d.dtype, torch.float32), value.dtype)
    return value.to(wide) * d.to(wide)


@dataclass(frozen=True)
class Normal:
    """left · (base + terms) · right: what kernels, exporters and planners see."""

    left: tuple[Expr, ...]
    base: Expr
    terms: dict[str, Expr]
    right: tuple[Expr, ...]


def normal(expr: Expr) -> Normal | None:
    """The normal form, or None for a free tree (which runs dense)."""
    factors = expr.acting() if isinstance(expr, Product) else [expr]
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


def between(left: Sequence[Expr], expr: Expr, right: Sequence[Expr]) -> Product:
    """left · expr · right, without a product inside."""
    return Product(*left, *(expr.kids() if isinstance(expr, Product) else (expr,)), *right)


def no_value(where: str, terms: Mapping[str, Expr]) -> ConflictError:
    """Why these terms together are no matrix, naming those to blame."""
    return ConflictError(
        "a weight has no single value",
        where=where,
        got="; ".join(
            f"{r} is {t.describe()}, which depends on the input" for r, t in terms.items() if not t.is_matrix
        ),
        want="a matrix",
        fix="leave it as it is (it runs, trains and is saved), or take that term away first",
    )


def valueless(exprs: Mapping[str, Expr]) -> list[WeftError]:
    """Of these weights by name, why some are no matrices."""
    return [no_value(name, terms_of(e)) for name, e in exprs.items() if not e.is_matrix]


def dense_copy(expr: Expr, dtype: torch.dtype) -> tuple[Tensor | None, list[Expr]]:
    """The sum of the frozen terms, dense, in this dtype and kept with the expression (None: there are none), and the others."""
    kept = expr.derive(f"dense {dtype}", lambda: _copy(expr, dtype))
    live = [t for t in terms_of(expr).values() if not any(t is tree for tree in kept.trees)]
    return (kept.value[0] if kept.value else None), live


def _copy(expr: Expr, dtype: torch.dtype) -> Derived:
    frozen = {r: t for r, t in terms_of(expr).items() if t.frozen() and t.is_matrix}
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
    """New nodes over the same storage. Tensors that are trained or written are copied, so that one never changes the other."""
    apart = written(expr)
    same = {id(t): own(t, apart) for t in tensors(expr).values()}  # what the tree holds twice stays one
    held = {k: same[id(t)] for k, t in tensors(expr).items()}
    return build(spec(expr), held.__getitem__)


def unfrozen(expr: Expr) -> Dense:
    """The value as one plain matrix that trains: a copy, in float32 or, of float64 tensors, in float64."""
    value = expr.dense().detach()
    return Dense(nn.Parameter(value.to(torch.promote_types(value.dtype, torch.float32), copy=True)))


def spec(expr: Expr) -> dict[str, Any]:
    """The tree without its tensors, as JSON: node names and plain fields."""
    made: dict[str, Any] = {"node": type(expr).__name__}
    for f in fields(type(expr)):
        value = expr.value(f)
        if f.kind == "child":
            made[f.name] = spec(value)
        elif f.kind == "children":
            made[f.name] = {k: spec(e) for k, e in value.items()} if isinstance(value, dict) else [*map(spec, value)]
        elif f.kind == "static":
            made[f.name] = value
    return made


Nodes = dict[object, Expr]


def build(tree: Mapping[str, Any], get: Callable[[str], Tensor], at: str = "", nodes: Nodes | None = None) -> Expr:
    """The expression of a spec; `get(path)` gives each tensor. Errors: FormatError for an unknown node or field.

    With `nodes`, those that were built before: what is alike in every field and over the same storage is one node.
    """
    kind = tree.get("node")
    if kind not in NODES:
        raise FormatError(
            "unknown node", where=at or "spec", got=kind, want=", ".join(sorted(NODES)), fix="use a newer weft"
        )
    cls = NODES[kind]
    want = {"node", *(f.name for f in fields(cls) if f.kind != "tensor")}
    if set(tree) | set(defaults(cls)) != want:
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
            values[f.name] = tree[f.name] if f.kind == "static" else _built(f, tree[f.name], get, at, nodes)
    made = cls(**values)
    return made if nodes is None else nodes.setdefault(_alike(made), made)


def _built(f: Field, tree: Any, get: Callable[[str], Tensor], at: str, nodes: Nodes | None) -> Any:
    """The children of one field."""
    if f.kind == "child":
        return build(tree, get, f"{at}{f.name}.", nodes)
    if f.named:
        return {k: build(t, get, f"{at}{f.name}.{k}.", nodes) for k, t in tree.items()}
    return tuple(build(t, get, f"{at}{f.name}.{i}.", nodes) for i, t in enumerate(tree))


def _alike(expr: Expr) -> object:
    """Equal for two nodes with equal fields: the same storage, the same children."""
    held = [(path, identity(t), t.requires_grad) for path, t in tensors(expr).items()]
    return json.dumps(spec(expr)), tuple(held)


def stack(parts: Sequence[Expr]) -> Expr:
    """One expression of the rows of like ones, in order; undoes `take` in slices."""
    return parts[0] if len(parts) == 1 else type(parts[0]).join(parts)
