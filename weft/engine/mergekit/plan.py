"""What a configuration of mergekit asks for: models, and what every tensor of theirs is merged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from weft.engine.mergekit.rules import ASKED, Parameter, Rule
from weft.engine.run import Step
from weft.error import OptionError, WeftError

Value = float | bool
Table = Mapping[str, "Setting"]
_OWN = ("inputs", "members")


@dataclass(frozen=True)
class Setting:
    """A parameter's value for every tensor: those of the first filter that its name has in it, spread over the depth."""

    cases: tuple[tuple[str, tuple[Value, ...]], ...]

    def at(self, name: str, depth: float) -> Value | None:
        """For the tensor of this name, 0 to 1 deep; numbers are interpolated. None where no filter fits."""
        values = next((v for text, v in self.cases if text in name), None)
        if values is None:
            return None
        place = depth * (len(values) - 1)
        i, share = int(place), place - int(place)
        if isinstance(values[i], bool) or not share:
            return values[i]
        return (1 - share) * values[i] + share * values[i + 1]

    @property
    def spread(self) -> bool:
        """Whether it depends on the depth."""
        return any(len(values) > 1 for _, values in self.cases)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers, all of them where there is no range: the models in order, with their parameters and those of all."""

    models: Mapping[str, Table]
    parameters: Table = field(default_factory=dict[str, Setting])
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Plan:
    """What a configuration asks for."""

    where: str
    rule: Rule
    name: str
    """What mergekit calls the method."""
    slices: tuple[Slice, ...]
    parameters: Table
    base: str | None = None
    dtype: torch.dtype | None = None
    """What the result is stored in."""
    tokenizer: str | None = None
    """The model whose tokenizer the result has, where it says so."""
    notes: tuple[str, ...] = ()
    """What the file says that changes nothing."""

    @property
    def models(self) -> list[str]:
        """The members in order: for a merge that counts the base among them, the base too."""
        held = list(self.slices[0].models)
        if self.rule.base == "first" and self.base in held:
            return [self.base, *(m for m in held if m != self.base)]
        return held if self.rule.base == "a model" else [m for m in held if m != self.base]

    @property
    def deep(self) -> bool:
        """Whether anything depends on where a tensor stands."""
        tables = [t for s in self.slices for t in (s.parameters, *s.models.values())]
        return bool(self.slices[0].layers) or any(v.spread for t in (self.parameters, *tables) for v in t.values())

    def misfit(self, layers: int) -> list[WeftError]:
        """Why these slices are not all the layers of a model that has so many, in their order."""
        ends = [s.layers for s in self.slices if s.layers is not None]
        if not ends or [i for a, b in ends for i in range(a, b)] == list(range(layers)):
            return []
        want, fix = (
            f"all layers in their order, 0 to {layers}",
            "stack layers with mergekit; weft cuts blocks: weft depth",
        )
        what, got = "weft makes no model of other layers", ", ".join(f"[{a}, {b}]" for a, b in ends)
        return [OptionError(what, where=f"{self.where}: slices", got=got, want=want, fix=fix)]

    def site(self, tensor: str, shape: tuple[int, int], at: int = 0, layers: int = 0) -> tuple[Step, list[float]]:
        """What the tensor of this name in the checkpoint is merged by; it is before the layers (0), in the one of number `at`, or behind.

        Errors: OptionError for a parameter that has no value there, or one that weft cannot do.
        """
        here, depth = self.slices[-1 if at > layers else 0], 0.0
        for s in self.slices if 0 < at <= layers else ():
            start, stop = s.layers or (0, layers)
            if start < at <= stop:
                here, depth = s, (at - 1 - start) / (stop - start - 1) if stop - start > 1 else 1.0
        common = (here.parameters, self.parameters)
        shared = {n: self._value(n, p, common, tensor, depth) for n, p in self._of("shared")}
        each = [
            {n: self._value(n, p, (here.models.get(m, {}), *common), tensor, depth, m) for n, p in self._of(*_OWN)}
            for m in self.models
        ]
        try:
            return self.rule.step(shared, each, shape)
        except OptionError as e:
            raise OptionError(e.what, where=f"{tensor}: {e.where}", got=e.got, want=e.want, fix=e.fix) from None

    def _of(self, *scopes: str) -> list[tuple[str, Parameter]]:
        return [(n, p) for n, p in self.rule.parameters.items() if p.scope in scopes]

    def _value(
        self, name: str, p: Parameter, tables: Sequence[Table], tensor: str, depth: float, model: str = ""
    ) -> Value:
        found = (t[name].at(tensor, depth) for t in tables if name in t)
        value = next((v for v in found if v is not None), p.default)
        if value is ASKED:
            want, fix = f"a {name}: {self.name} has no default for it", "add it, or a value without filter"
            where = f"{tensor} of {model}" if model else tensor
            raise OptionError("a parameter has no value", where=where, got=f"no {name}", want=want, fix=fix)
        return p.kind(value)
