"""Adapters of single linear layers: which tensors each has, and what is wrong with those of a folder."""

from __future__ import annotations

import difflib
import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weft.error import ConflictError, ShapeError, WeftError
from weft.expr import Expr, terms_of, total
from weft.model import Place, places
from weft.model.devices import device_of
from weft.store.audit import Entry
from weft.store.peft.kind import FLOATS, Change, Held, Kind, Reader, Woven, heading
from weft.store.peft.settings import CONFIG, COPY, MERGE, PREFIX, TENSORS, brief, ends, key, some, wrong


@dataclass(frozen=True)
class At:
    """What has tensors of its own in a folder: a layer [m n], or the stacked weights of a layer's experts."""

    path: str
    sites: tuple[str, ...]
    """One; of `count` stacked experts of each expert in turn."""
    shape: tuple[int, int]
    kind: str
    bias: str = ""
    """The name of the layer's bias, if it has one."""
    count: int = 1
    target: str = ""
    """What settings call it, where its tensors have another path."""

    @property
    def name(self) -> str:
        """What settings call it."""
        return self.target or self.path

    @property
    def m(self) -> int:
        """Outputs."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs."""
        return self.shape[1]


class Layers(Kind):
    """Adapters of single linear layers, with tensors for each of them."""

    parts: ClassVar[tuple[str, ...]]
    """How the names of a layer's tensors end."""
    shared: ClassVar[tuple[str, ...]] = ()
    """The names of tensors that all layers share."""
    integers: ClassVar[tuple[str, ...]] = ()
    """Parts that are whole numbers."""
    transposed: ClassVar[bool] = True
    """Whether PEFT has it for weights that are stored [n m], as GPT-2's are."""

    @abstractmethod
    def shapes(self, s: Any, at: At) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's tensors by part."""

    @abstractmethod
    def value(self, s: Any, at: At, t: Held, common: Held) -> Expr:
        """A layer's term, or side."""

    def why(self, s: Any, at: At) -> str:
        """Where the shapes come from."""
        return f"by {CONFIG}"

    def lacks(self, s: Any, found: Mapping[str, Entry], mine: Collection[At]) -> list[WeftError]:
        """What is wrong with shared tensors, for these layers."""
        return []

    def common(self, s: Any, held: Held, mine: Collection[At]) -> dict[str, Tensor]:
        """What layers share, made once for these."""
        return {}

    def carriers(self, model: nn.Module, s: Any) -> dict[str, At]:
        """What can have tensors, by the path in their names: the layers."""
        return layers(model)

    def change(self, woven: Woven, s: Any, at: At, t: Held, common: Held, role: str) -> Change:
        """What a layer's tensors change."""
        now = woven.exprs[at.sites[0]]
        device = device_of(now)
        own, both = {k: x.to(device).clone() for k, x in t.items()}, {k: x.to(device) for k, x in common.items()}
        made = woven.turned(at.sites[0], self.value(s, at, own, both))
        return Change({at.sites[0]: total({**terms_of(now), role: made})})

    def read(self, model: nn.Module, s: Any, found: Mapping[str, Entry]) -> tuple[list[WeftError], Reader]:
        known, held, strays = self.carriers(model, s), dict[str, dict[str, Entry]](), list[str]()
        for name, entry in found.items():
            part = next((p for p in self.parts if name.endswith(f".{p}") and name.startswith(PREFIX)), None)
            if part is not None:
                held.setdefault(name.removeprefix(PREFIX).removesuffix(f".{part}"), {})[part] = entry
            elif name not in self.shared:
                strays.append(name)
        want = " and ".join(key("MODULE", p) for p in self.parts)
        problems = some(
            strays,
            lambda n: wrong(f"a tensor is no part of {self.peft_type}", n, list(found[n].shape), want, MERGE),
        )
        problems += some([p for p in held if p not in known], lambda p: _unknown(p, known))
        if not held:
            problems.append(wrong("the adapter has no layer", TENSORS, f"{len(found)} tensors", want))
        mine = {path: at for path, at in known.items() if path in held}
        problems += self.lacks(s, found, mine.values())
        for path, at in mine.items():
            problems += self._misfits(model, s, at, held[path])
        if s.fan_in_fan_out and any(at.kind != "conv1d" for at in mine.values()):
            want = "false, but for layers that are stored [inputs outputs]"
            what, where = "the adapter is of transposed weights", f"{CONFIG}: fan_in_fan_out"
            problems.append(ConflictError(what, where=where, got="true", want=want, fix=MERGE))
        problems += self.unlike(model, s, set(held))

        def make(tensors: Held, name: str) -> Change:
            made, woven, both = Change(), Woven.of(model), self.common(s, tensors, mine.values())
            for path, at in mine.items():
                own = {part: tensors[key(path, part)] for part in held[path]}
                one = self.change(woven, s, at, own, both, f"adapter:{name}")
                made.exprs |= one.exprs
                made.vectors |= one.vectors
            return made

        return problems, make

    def _misfits(self, model: nn.Module, s: Any, at: At, have: Mapping[str, Entry]) -> list[WeftError]:
        """Why a layer cannot take these tensors."""
        if got := _no_layer(model, at):
            what = "the adapter's module takes none"
            return [ConflictError(what, where=at.path, got=got, want="a linear layer", fix=MERGE)]
        if at.kind == "conv1d" and not self.transposed:
            what, got = f"PEFT has no {self.peft_type} for this layer", "a weight that is stored [inputs outputs]"
            return [ConflictError(what, where=at.path, got=got, want="a linear layer", fix=COPY)]
        problems: list[WeftError] = []
        expected = self.shapes(s, at)
        for part, shape in expected.items():
            name, entry = key(at.path, part), have.get(part)
            good = {torch.int32, torch.float32} if part in self.integers else FLOATS
            if entry is None:
                problems.append(wrong("a part of a layer is missing", name, "no such tensor", f"{list(shape)}"))
            elif entry.shape != shape or entry.dtype not in good:
                got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
                numbers = "whole numbers" if part in self.integers else "floats"
                want = f"{numbers} {list(shape)}: {self.why(s, at)}"
                problems.append(ShapeError("a tensor does not fit", where=name, got=got, want=want, fix=COPY))
        return problems + [
            wrong("a tensor is one too many", key(at.path, p), list(have[p].shape), ", ".join(expected))
            for p in have
            if p not in expected
        ]

    def unlike(self, model: nn.Module, s: Any, have: set[str]) -> list[WeftError]:
        """How the layers differ from a list of targets; a regular expression says nothing."""
        if not isinstance(s.target_modules, list):
            return []
        linear = [path for path, at in layers(model).items() if at.kind in ("linear", "conv1d")]
        meant = [path for path in linear if s.targets(path)]
        count = f"{len(have.intersection(meant))} of {len(meant)} modules"
        problems = some(
            [path for path in meant if path not in have],
            lambda path: wrong(
                "the adapter is incomplete", key(path, self.parts[0]), count, "every module of target_modules"
            ),
        )
        problems += some(
            sorted(have.intersection(linear).difference(meant)),
            lambda path: wrong(
                "a module is not meant by the settings", f"{TENSORS}: {path}", path, "a module of target_modules"
            ),
        )
        known = {end for path in linear for end in ends(path)}
        given = cast("list[str]", s.target_modules)
        return problems + some(
            [entry for entry in given if entry not in known],
            lambda entry: wrong(
                "a target got no tensor", f"{CONFIG}: target_modules", entry or "''", "a linear layer's name"
            ),
        )

    def unfit(self, site: str, place: Place) -> list[WeftError]:
        """Why PEFT cannot adapt a weight."""
        reason = ""
        if len(place.modules) > 1:
            reason = "the weight is tied"
        elif not place.linear:
            reason = f"the weight is {'an' if place.kind[0] in 'aeiou' else 'a'} {place.kind}"
        elif place.kind == "conv1d" and not self.transposed:
            reason = "the weight is stored [inputs outputs], which PEFT has no such adapter for"
        return [self.no(site, reason, "one linear layer")] if reason else []

    def targets(self, model: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
        """The settings that all types share. Errors: ConflictError for a path that PEFT would take for another's too."""
        known, chosen = layers(model), set(paths)
        meant = [p for p in known if p not in chosen and any(end in chosen for end in ends(p)[1:])]
        if meant:
            got, want = f"{meant[0]} ends with the name of a module that has an adapter", "names of their own"
            problem = self.no(meant[0], got, want)
            raise problem
        fan = bool(paths) and all(p in known and known[p].kind == "conv1d" for p in paths)
        return {
            **heading(self.peft_type, model),
            "target_modules": sorted(paths),
            **({"fan_in_fan_out": True} if fan else {}),
        }


def layers(model: nn.Module) -> dict[str, At]:
    """Every woven module by its path."""
    made: dict[str, At] = {}
    for place in places(model).values():
        for path in place.modules:
            bias = getattr(model.get_submodule(path), "bias", None)
            shape = place.shape[::-1] if place.kind == "conv1d" else (place.shape[0], math.prod(place.shape[1:]))
            name = f"{path}.bias" if isinstance(bias, nn.Parameter) else ""
            made[path] = At(path, (place.name,), (shape[0], shape[1]), place.kind, name)
    return made


def _no_layer(model: nn.Module, at: At) -> str:
    """Why a woven module is no linear layer of its own."""
    if at.kind == "experts":
        return ""
    place = places(model)[at.sites[0]]
    if len(place.modules) > 1:
        return f"a weight shared with {', '.join(p for p in place.modules if p != at.path)}"
    return "" if place.linear else type(model.get_submodule(at.path)).__name__.removeprefix("Woven")


def _unknown(path: str, known: Collection[str]) -> WeftError:
    near = difflib.get_close_matches(path, known, 3, 0.5)
    want = f"one of the model's; near: {', '.join(near)}" if near else "one of the model's linear layers"
    return wrong("the adapter is of a module that the model has not", f"{TENSORS}: {path}", brief(path), want)
