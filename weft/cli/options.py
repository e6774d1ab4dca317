"""Command-line options from the fields of a method's options, and back."""

from __future__ import annotations

import enum
import inspect
import types
import typing
from typing import Annotated, Any, Literal, cast

import typer

from weft.error import OptionError


def parameter(name: str, field: Any) -> inspect.Parameter:
    """The command-line option of one field of a method's options. Errors: OptionError for a type that has none."""
    flag = f"--{name.replace('_', '-')}"
    kind = _option_type(field.annotation, name)
    flags = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    bounds = ", ".join(
        f"{word} {getattr(m, attr)}" for m in field.metadata for attr, word in _BOUNDS.items() if hasattr(m, attr)
    )
    text = f"{field.description or name}{f' ({bounds})' if bounds else ''}"
    default = inspect.Parameter.empty if field.is_required() else _chosen(kind, field.default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*flags, help=text)],
    )


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _option_type(hint: Any, name: str) -> Any:
    """What typer is told: a choice of texts becomes an enumeration."""
    if hint in (bool, int, float, str):
        return hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and args == (str, ...):
        return list[str]
    if origin is Literal and all(isinstance(a, str) for a in args):
        return enum.Enum(name, {a: a for a in args}, type=str)
    if (each := _each(hint)) is not None:
        return list[_option_type(each, name)]
    if origin in (typing.Union, types.UnionType) and len(args) == 2 and type(None) in args:
        return _option_type(next(a for a in args if a is not type(None)), name) | None
    want, fix = "bool, int, float, text or a choice of texts", "call weft.apply in Python"
    raise OptionError("an option cannot be given on the command line", where=name, got=hint, want=want, fix=fix)


def _each(hint: Any) -> Any:
    """The type of an option that is one for all members of a merge or one a member (`Each`); None for any other."""
    one, *more = typing.get_args(hint) or (None,)
    if len(more) != 1 or more[0] != tuple[one, ...]:
        return None
    return typing.get_args(one)[0] if typing.get_origin(one) is Annotated else one


def as_taken(value: Any, field: Any) -> Any:
    """What the command line gave, as the method takes it."""
    if _each(field.annotation) is not None:
        return value[0] if len(value) == 1 else tuple(value)
    return plain(value)


def _chosen(kind: Any, default: Any) -> Any:
    if typing.get_origin(kind) is list and not isinstance(default, tuple):
        return [default]
    if isinstance(default, tuple):
        return list(cast(tuple[str, ...], default))
    return kind(default) if isinstance(kind, type) and issubclass(kind, enum.Enum) else default


def plain(value: Any) -> Any:
    """The text of a choice; anything else as it is."""
    return value.value if isinstance(value, enum.Enum) else value
