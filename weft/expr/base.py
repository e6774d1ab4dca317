"""Expr: a weight as a small immutable tree whose value is one matrix [m n]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weft.error import ShapeError, raise_all
from weft.expr.derived import Derived
from weft.expr.fields import Field, defaults, each, fields, misfit
from weft.expr.products import FrozenProduct, product

CHUNK = 1 << 24
"""Elements of a weight that are made dense at a time where a product can go row by row (64 MiB in float32)."""

_AGAIN: Any = checkpoint


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


NODES: dict[str, type[Expr]] = {}
"""Every node by name: a class of Expr is one as soon as its file is imported."""


class Expr(nn.Module):
    """A weight of shape [m n]. Never changed in place: a rewrite returns a new tree that shares storage.

    A node is a class of annotated fields, given to the constructor in that order: tensors
    (`Float[Tensor, "m r"]`: checked and bound to the dimension names), children (`Expr`; `Sequence[Expr]` or
    `Mapping[str, Expr]` for several) and plain values (int, float, str, bool; a value in the class is the default).
    Tensors become parameters, frozen unless passed as a trainable `nn.Parameter`; packed ones too, so that FSDP shards them and
    DDP does not send them before every step.
    All that a node must write is `dense`, and `size` where its shape is not the dimensions "m" and "n".
    """

    __annotations__: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    shape: tuple[int, int]
    is_matrix: bool
    """Whether it has a value; False if what it does depends on the input, and then `dense` and `rows` are refused."""
    routes: ClassVar[bool] = False
    """Whether what the node does with its children depends on the input."""
    soft: ClassVar[bool] = False
    """Whether the node only trains towards what `hard` gives."""
    written: ClassVar[tuple[str, ...]] = ()
    """Tensors that are written while a model runs: a fork has its own."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (got := NODES.get(cls.__name__, cls).__module__) != cls.__module__:
            want, fix = "a name of its own", "rename one"
            raise ShapeError("two nodes share a name", where=cls.__name__, got=got, want=want, fix=fix)
        NODES[cls.__name__] = cls

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()
        spec = fields(type(self))
        values = self._arguments(spec, args, named)
        dims: dict[str, int] = {}
        raise_all([p for f in spec if (p := misfit(type(self).__name__, f, values[f.name], dims))])
        for f in spec:
            self._store(f, values[f.name])
        self.is_matrix = not self.routes and all(kid.is_matrix for kid in self.kids())
        self.shape = self.size(dims)
        self.check()

    def _arguments(self, spec: tuple[Field, ...], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        values = dict(defaults(type(self)))
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

    def _store(self, f: Field, value: Any) -> None:
        if f.kind == "tensor":
            self.register_parameter(
                f.name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            )
        elif f.kind == "child":
            self.add_module(f.name, value)
        elif f.kind == "children":
            self.add_module(f.name, nn.ModuleDict(dict(value)) if f.named else nn.ModuleList(value))
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
        """x times the transposed value, in x's dtype. Frozen: nothing dense is kept for the backward, compiled or not."""
        if not self.frozen():
            return self._plain_product(x)
        if torch.compiler.is_compiling():  # a compiler sees every step of `dense`, and makes it again in the backward
            return cast(Tensor, _AGAIN(self._plain_product, x, use_reentrant=False))
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self.times(x)
        return FrozenProduct.apply(x, self)

    def _plain_product(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        return F.linear(x, self.dense().to(x.dtype))

    def times(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        """x times the transposed value of a frozen expression, outside of any graph."""
        return product(x, self)

    def rows(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
        """The rows with these indices (an embedding look-up)."""
        if not self.frozen():  # `take` makes frozen leaves, which would cut the gradient
            return F.embedding(ids, self.dense())
        from weft.expr._outside import frozen_rows

        return cast(Tensor, cast(Any, frozen_rows)(self, ids))

    def take(self, rows: slice | Int[Tensor, "k"]) -> Expr:
        """The expression of these rows: tensors whose first dimension is m are indexed, children asked; a slice shares storage.

        Of a node that has neither the rows of its value, dense.
        """
        changed: dict[str, Any] = {}
        for f in fields(type(self)):
            if f.kind == "tensor" and f.dims[:1] == ("m",):
                changed[f.name] = getattr(self, f.name)[rows]
            elif f.kind in ("child", "children"):
                changed[f.name] = each(methodcaller("take", rows), self.value(f))
        return self.rebuild(**changed) if changed else NODES["Dense"](self.dense()[rows])

    def mapped(self, dim: int, values: Callable[[Tensor], Tensor], beside: Callable[[Expr], Expr]) -> Expr:
        """The expression after a linear map of its outputs (`dim` 0) or its inputs (1), term by term.

        A node whose numbers can take the map changes them: `values` maps a matrix along that dimension. Any other keeps its codes
        and is given to `beside`, which puts the map next to it.
        """
        return beside(self)

    @classmethod
    def join(cls, parts: Sequence[Expr]) -> Expr:
        """The rows of like expressions, in order. Tensors without rows are the first part's."""
        changed: dict[str, Any] = {}
        for f in fields(cls):
            held = [p.value(f) for p in parts]
            if f.kind in ("child", "children"):
                changed[f.name] = each(_joined, *held)
            elif f.kind == "tensor" and f.dims[:1] == ("m",):
                changed[f.name] = torch.cat([t.detach() for t in held])
        return parts[0].rebuild(**changed)

    def row_slices(self, most: int | None = None) -> Iterator[slice]:
        """Consecutive ranges of rows, none of more than `CHUNK` entries, nor than `most`; of many rows sixteens, as products like them."""
        m, n = self.shape
        step = max(1, min(CHUNK, most or CHUNK) // max(1, n))
        step -= step % 16 if step > 16 else 0
        return (slice(i, min(i + step, m)) for i in range(0, m, step))

    def slices(self, most: int | None = None) -> Iterator[Expr]:
        """The expression in slices of rows, none of more than `CHUNK` dense entries, nor than `most`."""
        for s in self.row_slices(most):
            yield self if s == slice(0, self.shape[0]) else self.take(s)

    def rebuild(self, **changed: Any) -> Self:
        """The same node with some fields replaced; the others are shared."""
        return type(self)(**{f.name: changed.get(f.name, self.value(f)) for f in fields(type(self))})

    def value(self, f: Field) -> Any:
        """A field as the constructor takes it."""
        held = getattr(self, f.name)
        if f.kind == "children":
            return dict(held.items()) if f.named else tuple(held)
        return held

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

    def hard(self) -> Expr:
        """What is kept when training is over: the same tree with what soft nodes train towards, or itself where there is none."""
        if not any(isinstance(node, Expr) and node.soft for node in self.modules()):
            return self
        held = [f for f in fields(type(self)) if f.kind in ("child", "children")]
        return self.rebuild(**{f.name: each(methodcaller("hard"), self.value(f)) for f in held})

    def promises(self) -> Promises:
        """What is known of the value by construction."""
        return Promises()

    def mask(self) -> Tensor | None:
        """Bool [m n]: the entries that may be non-zero; None where there is no zero pattern."""
        return None

    def nbytes(self) -> int:
        """Tensor bytes that the expression takes on disk, alone; what it shares with others is counted whole."""
        return sum(t.numel() * t.element_size() for t in {identity(t): t for t in tensors(self).values()}.values())

    def bits_per_weight(self) -> float:
        """Stored bits per entry of the matrix."""
        return 8 * self.nbytes() / max(1, self.shape[0] * self.shape[1])

    def frozen(self) -> bool:
        """Whether no tensor in the tree is trainable."""
        held = self.parameters() if self._modules else self._parameters.values()
        return not any(p is not None and p.requires_grad for p in held)

    def kids(self) -> Iterator[Expr]:
        """The child expressions, in order."""
        for f in fields(type(self)):
            value = self.value(f)
            if f.kind == "child":
                yield value
            elif f.kind == "children":
                yield from value.values() if isinstance(value, dict) else value

    def describe(self) -> str:
        """One line for people, such as `int4[g64]` or `LowRank(16)`."""
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.describe()}"


def mapped(t: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
    """A node's tensor after a map of its values: as trainable as it was."""
    made = values(t.detach())
    return nn.Parameter(made) if t.requires_grad else made


def tensors(expr: Expr) -> dict[str, Tensor]:
    """Every tensor of the tree by its path, as they are stored."""
    return dict(expr.named_parameters(remove_duplicate=False))


def identity(t: Tensor) -> object:
    """Equal for two tensors that are the same numbers in the same memory."""
    if type(t) not in (Tensor, nn.Parameter) or t.device.type == "meta" or not t.numel():
        return id(t)
    return t.device, t.data_ptr(), t.dtype, t.shape, t.stride()


def written(model: nn.Module) -> set[int]:
    """The ids of the tensors that nodes write while they run."""
    return {id(getattr(node, name)) for node in model.modules() if isinstance(node, Expr) for name in node.written}


def own(t: Tensor, apart: set[int]) -> nn.Parameter:
    """What a fork has of a tensor: the same storage, or a copy if it is trained or among these."""
    held = t.detach().clone() if t.requires_grad or id(t) in apart else t.detach()
    return nn.Parameter(held, requires_grad=t.requires_grad)


def _joined(*parts: Expr) -> Expr:
    return type(parts[0]).join(parts)
