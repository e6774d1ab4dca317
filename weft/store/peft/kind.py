"""What every type of PEFT's adapters says about itself, and what those of single layers have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.error import ConflictError, WeftError
from weft.expr import Expr, LowRank
from weft.model import Branch, Place, Tap, expressions, taps
from weft.model.taps import moved
from weft.store.audit import Entry
from weft.store.peft.settings import Settings

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
Held = Mapping[str, Tensor]
"""Tensors by name."""
Reader = Callable[[Held, str], "Change"]
"""What a folder changes in the model, from its tensors and the adapter's name."""


@dataclass
class Change:
    """What becomes of a model: expressions by site, rows by vector, and branches."""

    exprs: dict[str, Expr] = field(default_factory=dict[str, Expr])
    vectors: dict[str, Expr] = field(default_factory=dict[str, Expr])
    branches: list[Branch] = field(default_factory=list[Branch])


@dataclass(frozen=True)
class Piece:
    """A site's part of an adapter that is to be written: terms that are added to its base, or the base between sides."""

    place: Place
    terms: dict[str, Expr]
    """By role."""
    magnitude: Tensor | None = None
    """The lengths of the sum's rows, where they are apart (DoRA)."""


@dataclass
class Found:
    """An adapter of a model that is to be written, and what is left without it."""

    pieces: dict[str, Piece] = field(default_factory=dict[str, Piece])
    branches: list[Branch] = field(default_factory=list[Branch])
    vectors: set[str] = field(default_factory=set[str])
    """Vectors that have other values than the pretrained ones because of it."""
    rest: dict[str, Expr] = field(default_factory=dict[str, Expr])
    """What stays of every site."""


@dataclass(frozen=True)
class Written:
    """The content of a folder."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Woven:
    """A model that is given an adapter: its expressions, and the taps of its sites."""

    model: nn.Module
    exprs: Mapping[str, Expr]
    taps: Mapping[str, Tap]

    @classmethod
    def of(cls, model: nn.Module) -> Woven:
        return cls(model, expressions(model), taps(model))

    def turned(self, site: str, made: Expr) -> Expr:
        """A term as a site has it whose input goes through turns: what it was made for is read before them."""
        tap = self.taps.get(site) or Tap()
        if isinstance(made, LowRank) and tap.turns():
            return made.rebuild(a=tap.turned(made.a.to(torch.promote_types(made.a.dtype, torch.float32))))
        for turn in tap.turns():
            made = moved(made, turn)
        return made


class Kind(ABC):
    """A type of PEFT's adapters: what its folder means, and which parts of weft's models are written as one."""

    peft_type: ClassVar[str]
    """`peft_type`."""
    method: ClassVar[str]
    """The methods of weft that it is the form of."""
    note: ClassVar[str] = ""
    """What is refused or otherwise, for the table of the documents."""
    settings: ClassVar[type[Settings]] = Settings
    order: ClassVar[int]
    """Which parts of a model are looked at first: 0 terms, 1 branches, 2 sides, 3 vectors."""
    idle: ClassVar[Collection[str]] = ()
    """Settings that the adapter's value does not depend on."""

    @abstractmethod
    def read(self, model: nn.Module, s: Any, found: Mapping[str, Entry]) -> tuple[list[WeftError], Reader]:
        """Everything that is wrong with a folder for this model, and what makes a change of its tensors."""

    @abstractmethod
    def find(self, model: nn.Module, only: str | None) -> Found:
        """The parts of the model that may be such an adapter (of one name), and the rest of its sites."""

    @abstractmethod
    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        """Why these parts are none."""

    def strange(self, found: Found) -> int:
        """How many of these parts are of another kind."""
        return 0

    @abstractmethod
    def write(self, model: nn.Module, found: Found) -> Written:
        """The tensors and settings of these parts. Errors: ConflictError for what one folder cannot say."""

    def no(self, where: str, got: str, want: str, fix: str = "") -> ConflictError:
        """The refusal to write a part."""
        fix = fix or 'merge it into the weights (weft.merge), or export with to="hf"'
        return ConflictError(
            f"PEFT's {self.peft_type} cannot hold this adapter", where=where, got=got, want=want, fix=fix
        )


def heading(kind: str, model: nn.Module) -> dict[str, Any]:
    """The settings that every folder has, but for the base."""
    return {"peft_type": kind, "task_type": task(model), "inference_mode": True}


def task(model: nn.Module) -> str | None:
    """What PEFT calls the model's task, where its class tells: text, or features of text."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if name.endswith("Model") else None


def alpha(scale: float, over: float) -> float:
    """The number that divided by `over` is this scale, if there is one; else the nearest."""
    near = scale * over
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((a for a in tried if a / over == scale), near)
