"""Expr: a weight as a small immutable tree whose value is one matrix [m n]."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.error import ShapeError, WeftError, raise_all
from weft.expr.derived import Derived
from weft.expr.products import FrozenProduct, product

CHUNK = 1 << 24
"""Elements of a weight that are made dense at a time where a product can go row by row (64 MiB in float32)."""


@dataclass(frozen=True)
class Promises:
    """What is known of a term's value without looking at it, and must stay true until someone says otherwise."""

    zeros: bool = False
    """Some entries are zero by construction; `Expr.mask()` says which may be non-zero."""
    nm: tuple[int, int] | None = None
    """At most N of every M neighbours in a row are non-zero."""
    rank: int | None = None
    """The rank is at most this."""
    levels: int | None = None
    """Each row group holds at most this many distinct values."""


@dataclass(frozen=True)
class Field:
    """One annotated field of a node: a tensor with named dimensions, a child expression, or a plain value."""

    name: str
    kind: Literal["tensor", "child", "static"]
    type: Any
    dims: tuple[str, ...] = ()


NODES: dict[str, type[Expr]] = {}


@functools.cache
def fields(cls: type[Expr]) -> tuple[Field, ...]:
    """The node's fields in order of annotation."""
    out: list[Field] = []
    for name, hint in typing.get_type_hints(cls).items():
        if name.startswith("_") or typing.get_origin(hint) is ClassVar or name not in cls.__annotations__:
            continue
        if hasattr(hint, "dim_str"):
            out.append(Field(name, "tensor", hint, tuple(hint.dim_str.split())))
        else:
            out.append(Field(name, "child" if hint is Expr else "static", hint))
    return tuple(out)


class Expr(nn.Module):
    """A weight of shape [m n]. Never changed in place: a rewrite returns a new tree that shares storage.

    A node is a class of annotated fields, given to the constructor in that order: tensors
    (`Float[Tensor, "m r"]`: checked and bound to the dimension names), children (`Expr`) and plain values.
    Floating tensors become parameters (frozen unless passed as a trainable `nn.Parameter`), others buffers.
    All that a node must write is `dense`, and `size` where its shape is not the dimensions "m" and "n".
    """

    __annotations__: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    shape: tuple[int, int]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        NODES[cls.__name__] = cls

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()
        spec = fields(type(self))
        values = self._arguments(spec, args, named)
        dims: dict[str, int] = {}
        raise_all([p for f in spec if (p := self._check(f, values[f.name], dims))])
        for f in spec:
            self._store(f, values[f.name])
        self.shape = self.size(dims)
        self.check()

    def _arguments(self, spec: tuple[Field, ...], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        values = {
            f.name: getattr(type(self), f.name) for f in spec if f.kind == "static" and hasattr(type(self), f.name)
        }
        values |= dict(zip((f.name for f in spec), args, strict=False)) | named
        if len(args) > len(spec) or set(values) != {f.name for f in spec}:
            raise ShapeError(
                f"{type(self).__name__} got the wrong fields",
                where=type(self).__name__,
                got=f"{len(args)} by position, {sorted(named)} by name",
                want=", ".join(f.name for f in spec),
                fix="pass each field once",
            )
        return values

    def _check(self, f: Field, value: Any, dims: dict[str, int]) -> WeftError | None:
        name = type(self).__name__
        if f.kind != "tensor":
            want = Expr if f.kind == "child" else f.type
            good = isinstance(value, want) and not (want is int and isinstance(value, bool))
            got, wanted = type(value).__name__, want.__name__
        elif not isinstance(value, Tensor):
            good, got, wanted = False, type(value).__name__, "a tensor"
        else:
            dtype = str(value.dtype).removeprefix("torch.")
            bound = dict(dims)
            good = value.dim() == len(f.dims) and dtype in f.type.dtypes
            good = good and all(bound.setdefault(d, s) == s for d, s in zip(f.dims, value.shape, strict=True))
            got = f"{dtype}{list(value.shape)}"
            wanted = f"{f.type.__name__.split('[')[0]}[{' '.join(str(dims.get(d, d)) for d in f.dims)}]"
            if good:
                dims.update(bound)
        if good:
            return None
        return ShapeError(
            f"{name}.{f.name} does not fit",
            where=f"{name}.{f.name}",
            got=got,
            want=wanted,
            fix=f"pass {f.name} as {wanted}",
        )

    def _store(self, f: Field, value: Any) -> None:
        if f.kind == "tensor" and value.is_floating_point():
            self.register_parameter(
                f.name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            )
        elif f.kind == "tensor":
            self.register_buffer(f.name, value)
        elif f.kind == "child":
            self.add_module(f.name, value)
        else:
            object.__setattr__(self, f.name, value)

    def size(self, dims: dict[str, int]) -> tuple[int, int]:
        """The shape [m n], from the dimensions that the tensors bound."""
        return dims["m"], dims["n"]

    def check(self) -> None:
        """Refuse values that the field shapes alone cannot rule out (ShapeError)."""

    def dense(self) -> Float[Tensor, "m n"]:
        """The value, in float32 (a `Dense` keeps its own dtype; float64 tensors give float64)."""
        raise ShapeError(
            "this node has no value", where=type(self).__name__, got="Expr", want="a node", fix="write dense()"
        )

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """x times the transposed value, in x's dtype. Frozen: nothing dense is kept for the backward."""
        if self.frozen():
            return FrozenProduct.apply(x, self)
        return F.linear(x, self.dense().to(x.dtype))

    def times(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """x times the transposed value of a frozen expression, outside of any graph."""
        return product(x, self)

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        """The rows with these indices (an embedding look-up)."""
        if not self.frozen():  # `take` makes frozen leaves, which would cut the gradient
            return F.embedding(ids, self.dense())
        return self.take(ids.flatten()).dense().view(*ids.shape, self.shape[1])

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        """The expression of these rows. A slice shares storage; tensors whose first dimension is m are indexed."""
        made = self.rebuild(
            **{
                f.name: getattr(self, f.name)[rows]
                for f in fields(type(self))
                if f.kind == "tensor" and f.dims[0] == "m"
            },
            **{f.name: getattr(self, f.name).take(rows) for f in fields(type(self)) if f.kind == "child"},
        )
        return made

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        """The rows of like expressions, in order. Tensors without rows are the first part's."""
        changed: dict[str, Any] = {}
        for f in fields(cls):
            held = [getattr(p, f.name) for p in parts]
            if f.kind == "child":
                changed[f.name] = type(held[0]).join(held)
            elif f.kind == "tensor" and f.dims[0] == "m":
                changed[f.name] = torch.cat([t.detach() for t in held])
        return parts[0].rebuild(**changed)

    def row_slices(self, most: int | None = None) -> Iterator[slice]:
        """Consecutive ranges of rows, none of more than `CHUNK` entries, nor than `most`."""
        m, n = self.shape
        step = max(1, min(CHUNK, most or CHUNK) // max(1, n))
        return (slice(i, min(i + step, m)) for i in range(0, m, step))

    def slices(self, most: int | None = None) -> Iterator[Expr]:
        """The expression in slices of rows, none of more than `CHUNK` dense entries, nor than `most`."""
        for s in self.row_slices(most):
            yield self if s == slice(0, self.shape[0]) else self.take(s)

    def rebuild(self, **changed: Any) -> Self:
        """The same node with some fields replaced; the others are shared."""
        return type(self)(**{f.name: changed.get(f.name, getattr(self, f.name)) for f in fields(type(self))})

    def derive(self, name: str, make: Callable[[], Derived]) -> Derived:
        """What `make` gives, kept here under a name until a tensor that it was made of is replaced, written or trainable."""
        held: dict[str, Derived] = self.__dict__.setdefault("_derived", {})
        kept = held.get(name)
        if kept is None or not kept.good():
            with torch.inference_mode(False), torch.no_grad():
                kept = held[name] = make()
        return kept

    def derived(self) -> Iterator[Tensor]:
        """Every tensor that is kept here and in the children."""
        for node in self.modules():
            held: dict[str, Derived] = node.__dict__.get("_derived", {})
            yield from (t for kept in held.values() for t in kept.value)

    def drop_derived(self) -> None:
        """Forget what is kept here and in the children."""
        for node in self.modules():
            node.__dict__.pop("_derived", None)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_derived"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.__dict__.pop("_derived", None)
        return super()._apply(fn, recurse)

    def promises(self) -> Promises:
        """What is known of the value by construction."""
        return Promises()

    def mask(self) -> Tensor | None:
        """Bool [m n]: the entries that may be non-zero; None where there is no zero pattern."""
        return None

    def nbytes(self) -> int:
        """Tensor bytes that the expression takes on disk."""
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors(self).values()}.values())

    def bits_per_weight(self) -> float:
        """Stored bits per entry of the matrix."""
        return 8 * self.nbytes() / max(1, self.shape[0] * self.shape[1])

    def frozen(self) -> bool:
        """Whether no tensor in the tree is trainable."""
        return not any(p.requires_grad for p in self.parameters())

    def kids(self) -> Iterator[Expr]:
        """The child expressions, in order."""
        for f in fields(type(self)):
            if f.kind == "child":
                yield getattr(self, f.name)

    def describe(self) -> str:
        """One line for people, such as `int4[g64]` or `LowRank(16)`."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.describe()}"


def tensors(expr: Expr) -> dict[str, Tensor]:
    """Every tensor of the tree by its path, as they are stored."""
    return {**dict(expr.named_parameters(remove_duplicate=False)), **dict(expr.named_buffers(remove_duplicate=False))}
