"""What a node's annotations say: which fields it has, what fits in them, and what is wrong with what does not."""

from __future__ import annotations

import collections.abc
import functools
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from weft.error import ShapeError

_NAME = re.compile(r"[A-Za-z0-9_:-]+")


@dataclass(frozen=True)
class Field:
    """One annotated field of a node: a tensor with named dimensions, one child expression, several, or a plain value."""

    name: str
    kind: Literal["tensor", "child", "children", "static"]
    type: Any
    """The annotation; of several children that of one."""
    dims: tuple[str, ...] = ()
    named: bool = False
    """Whether several children have names."""


@functools.cache
def fields(cls: Any) -> tuple[Field, ...]:
    """The node's fields in order of annotation. Errors: ShapeError for an annotation that is no field's."""
    own = [(n, h) for n, h in typing.get_type_hints(cls).items() if n in cls.__annotations__ and n[0] != "_"]
    return tuple(_field(cls.__name__, n, h) for n, h in own if typing.get_origin(h) is not ClassVar)


def _field(node: str, name: str, hint: Any) -> Field:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "dim_str"):
        return Field(name, "tensor", hint, tuple(hint.dim_str.split()))
    if hint in (int, float, str, bool):
        return Field(name, "static", hint)
    if isinstance(hint, type) and issubclass(hint, nn.Module):
        return Field(name, "child", hint)
    if origin in (collections.abc.Sequence, collections.abc.Mapping) and issubclass(inner[-1], nn.Module):
        return Field(name, "children", inner[-1], named=origin is collections.abc.Mapping)
    raise ShapeError(
        "an annotation is no field's",
        where=f"{node}.{name}",
        got=hint,
        want="a jaxtyping tensor, Expr, Sequence[Expr], Mapping[str, Expr], int, float, str or bool",
        fix="annotate the field with one of these; what belongs to the class is a ClassVar",
    )


def defaults(cls: Any) -> dict[str, Any]:
    """The plain fields that may be left out, with the values they have then."""
    return {f.name: vars(cls)[f.name] for f in fields(cls) if f.kind == "static" and f.name in vars(cls)}


def misfit(node: str, f: Field, value: Any, dims: dict[str, int]) -> ShapeError | None:
    """What is wrong with a field's value; None if it fits, and its dimensions are bound in `dims`."""
    if f.kind == "tensor":
        good, got, wanted = _tensor(f, value, dims)
    elif f.kind == "children":
        good, got = _children(f, value), type(value).__name__
        wanted = "expressions by name, at least one" if f.named else "a list of expressions, at least one"
    else:
        good = isinstance(value, f.type) and not (f.type is int and isinstance(value, bool))
        got, wanted = type(value).__name__, f.type.__name__
    if good:
        return None
    where, fix = f"{node}.{f.name}", f"pass {f.name} as {wanted}"
    return ShapeError(f"{where} does not fit", where=where, got=got, want=wanted, fix=fix)


def _tensor(f: Field, value: Any, dims: dict[str, int]) -> tuple[bool, str, str]:
    """Whether a tensor fits its annotation and the dimensions so far, what it is, and what it should be."""
    if not isinstance(value, Tensor):
        return False, type(value).__name__, "a tensor"
    dtype = str(value.dtype).removeprefix("torch.")
    bound = dict(dims)
    good = value.dim() == len(f.dims) and dtype in f.type.dtypes
    good = good and all(bound.setdefault(d, s) == s for d, s in zip(f.dims, value.shape, strict=True))
    wanted = f"{f.type.__name__.split('[')[0]}[{' '.join(str(dims.get(d, d)) for d in f.dims)}]"
    if good:
        dims.update(bound)
    return good, f"{dtype}{list(value.shape)}", wanted


def _children(f: Field, value: Any) -> bool:
    """Whether the value is at least one expression, by sound names if the field has names."""
    if f.named:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) and _NAME.fullmatch(k) for k in value):
            return False
        value = list(value.values())
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(e, f.type) for e in value)


def each(fn: Callable[..., Any], *held: Any) -> Any:
    """The function of like fields' children: of the one, or of each."""
    if isinstance(held[0], dict):
        return {k: fn(*(h[k] for h in held)) for k in held[0]}
    return tuple(map(fn, *held)) if isinstance(held[0], tuple) else fn(*held)
