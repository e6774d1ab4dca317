"""What the names and settings of a PEFT folder mean. The settings are a stranger's: read, compared, never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from weft.error import ConflictError, FormatError, WeftError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What the names of a layer's tensors begin with."""
LIMIT = 1e30
"""No sound adapter has a number as large as this."""
COPY = "copy the adapter again from its source"
MERGE = "merge the adapter into its base with what made it, and load the result"
SHOWN, _MOST = 20, 100_000
_IDLE = {"peft_type", "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "runtime_config"}
"""Settings of every type that an adapter's value does not depend on."""
_NAME = re.compile(r"[\w.-]+")
_T = TypeVar("_T")
Rank = Annotated[int, Field(ge=1, le=1 << 31)]
Number = Annotated[float, Field(gt=-LIMIT, lt=LIMIT)]
Names = Annotated[list[str], Field(max_length=_MOST)]
Ranks = Annotated[dict[str, Rank], Field(max_length=_MOST)]
Numbers = Annotated[dict[str, Number], Field(max_length=_MOST)]


class Settings(BaseModel):
    """What of adapter_config.json an adapter's value depends on: for all types, which modules are meant."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    layers_to_transform: Annotated[list[int], Field(max_length=_MOST)] | int | None = None
    layers_pattern: Annotated[list[str], Field(max_length=100)] | str | None = None
    base_model_name_or_path: str | None = None
    bias: str | None = None
    fan_in_fan_out: bool | None = None

    def targets(self, path: str) -> bool:
        """Whether `target_modules`, a list of names, means this module."""
        if path == self.exclude_modules or named(path, self._excluded):
            return False
        return path in self._listed or (named(path, self._listed) and self._in_layers(path))

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(self.target_modules if isinstance(self.target_modules, list) else ())

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules if isinstance(self.exclude_modules, list) else ())

    def stacks(self) -> list[str]:
        """The names of `layers_pattern`."""
        given = self.layers_pattern or []
        return [given] if isinstance(given, str) else given

    def _in_layers(self, path: str) -> bool:
        given = self.layers_to_transform
        wanted = [given] if isinstance(given, int) else given
        return not wanted or _layer(path.split("."), self.stacks()) in wanted

    def patterns(self) -> dict[str, list[str]]:
        """By setting, the names that it gives values to."""
        excluded = [self.exclude_modules] if isinstance(self.exclude_modules, str) and self.exclude_modules else []
        return {"layers_pattern": self.stacks(), "exclude_modules": excluded}

    def odd(self) -> dict[str, Any]:
        """Settings that make the adapter's value another than what is read from its tensors."""
        return {"bias": self.bias} if self.bias not in (None, "none") else {}


class Ranked(Settings):
    """Settings of a type whose layers have a rank, and numbers that differ by name."""

    r: Rank
    rank_pattern: Ranks | None = None
    alpha_pattern: Numbers | None = None

    def rank(self, path: str) -> int:
        """The rank of a module's adapter."""
        return first(self.rank_pattern, path, self.r)

    def patterns(self) -> dict[str, list[str]]:
        own = {"rank_pattern": [*(self.rank_pattern or {})], "alpha_pattern": [*(self.alpha_pattern or {})]}
        return super().patterns() | own


def key(path: str, part: str) -> str:
    """The name in the file of a part of a module's adapter."""
    return f"{PREFIX}{path}.{part}"


def ends(path: str) -> list[str]:
    """The path, and what of it follows each dot."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def named(path: str, names: Collection[str]) -> bool:
    """Whether one of these is the path or its end."""
    return any(end in names for end in ends(path))


def first(pattern: Mapping[str, _T] | None, path: str, default: _T) -> _T:
    """The value of the first name in a pattern that fits."""
    fitting = [end for end in ends(path) if pattern and end in pattern]
    if not pattern or not fitting:
        return default
    return pattern[fitting[0] if len(fitting) == 1 else next(name for name in pattern if name in fitting)]


def _layer(parts: list[str], stacks: list[str]) -> int | None:
    """The number of the layer that a module lies in: after a stack's name, or the first with two names before it."""
    inner = [i for i, p in enumerate(parts[:-1]) if p.isdecimal()]
    if not stacks:
        return next((int(parts[i]) for i in inner if i >= 2), None)
    return next((int(parts[i]) for stack in stacks for i in inner if named(".".join(parts[:i]), [stack])), None)


def unsupported(table: Mapping[str, Any], s: Settings, idle: Collection[str]) -> list[WeftError]:
    """Settings under which the adapter's value is another, or that only running them would tell.

    `idle`: settings of its type that its value does not depend on.
    """
    read = {*_IDLE, *idle, *type(s).model_fields}
    odd = {k: v for k, v in table.items() if k not in read and not _unset(v)} | s.odd()
    plain = "this setting unset, or its default"
    rules = "a module's name, of letters, digits and . _ -; a stranger's regular expression is never run"
    fix = "write the modules' names in its place"
    return some(
        list(odd),
        lambda k: ConflictError(
            "the adapter's value is not known under this setting",
            where=f"{CONFIG}: {k}",
            got=brief(odd[k]),
            want=plain,
            fix=MERGE,
        ),
    ) + some(
        [(k, t) for k, texts in s.patterns().items() for t in texts if not _NAME.fullmatch(t)],
        lambda p: ConflictError(
            "a pattern is no name", where=f"{CONFIG}: {p[0]}", got=p[1] or "nothing", want=rules, fix=fix
        ),
    )


def _unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def brief(value: object) -> str:
    """A value of a stranger's file for an error: a plain one itself, else its type."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value) if plain else f"a {type(value).__name__}"


def some(items: Sequence[_T], make: Callable[[_T], WeftError]) -> list[WeftError]:
    """A problem for each of the first items, and one that counts the rest."""
    more = len(items) - SHOWN
    rest = ConflictError("more of the kind", where=TENSORS, got=f"{more} more", want="none", fix=COPY)
    return [make(item) for item in items[:SHOWN]] + ([rest] if more > 0 else [])


def wrong(what: str, where: str, got: object, want: str, fix: str = COPY) -> FormatError:
    """A folder that is not what it says."""
    return FormatError(what, where=where, got=got, want=want, fix=fix)
