"""What a PEFT LoRA folder's names and settings mean. The settings are a stranger's: read, compared, never run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weft.error import ConflictError, FormatError, WeftError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 1e30
"""No sound adapter has a number as large as this."""
COPY = "copy the adapter again from its source"
MERGE = "merge the adapter into its base with what made it, and load the result"
_SHOWN, _MOST = 20, 100_000
_IDLE = {
    "peft_type", "task_type", "inference_mode", "lora_dropout", "revision", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config", "unsloth_fixed",
}  # fmt: skip
"""Settings that the adapter's value does not depend on."""
_STARTS = {"gaussian", "eva", "orthogonal", "mica"}
"""Initialisations, besides true and false, that leave the base as it is."""
_NAME = re.compile(r"[\w.-]+")
_T = TypeVar("_T")
_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(gt=-LIMIT, lt=LIMIT)]
_Names = Annotated[list[str], Field(max_length=_MOST)]


class Settings(BaseModel):
    """What of adapter_config.json the adapter's value depends on."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool | None = None
    rank_pattern: Annotated[dict[str, _Rank], Field(max_length=_MOST)] | None = None
    alpha_pattern: Annotated[dict[str, _Alpha], Field(max_length=_MOST)] | None = None
    target_modules: _Names | str | None = None
    exclude_modules: _Names | str | None = None
    layers_to_transform: Annotated[list[int], Field(max_length=_MOST)] | int | None = None
    layers_pattern: Annotated[list[str], Field(max_length=100)] | str | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = None
    bias: str | None = None

    def rank(self, path: str) -> int:
        """The rank of a module's adapter."""
        return _first(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """alpha / r of a module's adapter; alpha / sqrt(r) where it is rank-stabilised."""
        r = self.rank(path)
        return _first(self.alpha_pattern, path, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

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


def key(path: str, half: str) -> str:
    """The name in the file of half A or B of a module's pair."""
    return f"base_model.model.{path}.lora_{half}.weight"


def split(name: str) -> tuple[str, str] | None:
    """Module and half of a tensor's name; None if it is no half of a pair."""
    path, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
    return (path, half) if half in ("A", "B") and name == key(path, half) else None


def ends(path: str) -> list[str]:
    """The path, and what of it follows each dot."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def named(path: str, names: Collection[str]) -> bool:
    """Whether one of these is the path or its end."""
    return any(end in names for end in ends(path))


def _first(pattern: Mapping[str, _T] | None, path: str, default: _T) -> _T:
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


def settings(table: Mapping[str, Any]) -> Settings:
    """The settings of a LoRA. Errors: FormatError naming all that are missing or ill-typed; ConflictError for other adapters."""
    kind = table.get("peft_type")
    if kind != "LORA":
        wrong = (ConflictError if isinstance(kind, str) else FormatError)(
            "this kind of adapter cannot be attached",
            where=f"{CONFIG}: peft_type",
            got=brief(kind),
            want="LORA",
            fix=MERGE,
        )
        raise wrong
    try:
        return Settings.model_validate(table)
    except ValidationError as e:
        bad = {".".join(map(str, p["loc"])): p for p in e.errors()[:_SHOWN]}
        got = {k: "nothing" if p["type"] == "missing" else brief(p["input"]) for k, p in bad.items()}
        raise FormatError(
            "the adapter's settings are wrong",
            where=f"{CONFIG}: {', '.join(bad)}",
            got=", ".join(f"{k}={v}" for k, v in got.items()),
            want="; ".join(f"{k}: {p['msg']}" for k, p in bad.items()),
            fix=COPY,
        ) from None


def unsupported(table: Mapping[str, Any], s: Settings) -> list[WeftError]:
    """Settings under which the adapter's value is not scale B A, or that only running them would tell."""
    odd = {k: v for k, v in table.items() if k not in {*_IDLE, *Settings.model_fields} and not _unset(v)}
    odd |= {"bias": s.bias} if s.bias not in (None, "none") else {}
    start = s.init_lora_weights
    odd |= {"init_lora_weights": start} if isinstance(start, str) and start.lower() not in _STARTS else {}
    plain = "a plain LoRA: this setting unset, or its default"
    excluded = [s.exclude_modules] if isinstance(s.exclude_modules, str) and s.exclude_modules else []
    texts = {"rank_pattern": s.rank_pattern or {}, "alpha_pattern": s.alpha_pattern or {}}
    texts |= {"layers_pattern": s.stacks(), "exclude_modules": excluded}
    held = [(k, t) for k, ts in texts.items() for t in ts]
    rules = "a module's name, of letters, digits and . _ -; a stranger's regular expression is never run"
    fix = "write the modules' names in its place"
    return some(
        list(odd),
        lambda k: ConflictError(
            "the adapter is no plain LoRA", where=f"{CONFIG}: {k}", got=brief(odd[k]), want=plain, fix=MERGE
        ),
    ) + some(
        [(k, t) for k, t in held if not _NAME.fullmatch(t)],
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
    more = len(items) - _SHOWN
    rest = ConflictError("more of the kind", where=TENSORS, got=f"{more} more", want="none", fix=COPY)
    return [make(item) for item in items[:_SHOWN]] + ([rest] if more > 0 else [])
