"""What a merge measures together: weights of a layer, or all that is merged."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from weft.error import OptionError
from weft.model import Scope, Sources
from weft.model.blocks import blocks
from weft.model.sources import Together

Names = tuple[str, ...]


@dataclass(frozen=True)
class Scopes:
    """The scopes of one merge. What is measured in one of them is kept as long as this is."""

    lead: nn.Module
    names: Names
    """All that is merged, in the model's order."""
    how: Mapping[str, str]
    """How each is merged: names that are merged otherwise share no measures."""
    open: Callable[[str, Sequence[str] | None], Sources]
    """What is merged of this name, its members in this order; hashed, and in the order of the hashes, without one."""
    about: Callable[[Sources], str]
    """A hash of what that depends on."""
    _held: dict[tuple[Names, str], tuple[Names, Together]] = field(
        default_factory=dict[tuple[Names, str], tuple[Names, Together]]
    )
    _told: dict[str, str] = field(default_factory=dict[str, str])

    def wider(self, name: str, scope: Scope) -> Sources:
        """What is merged of a name, measured with all in scope; there members have one order, which depends on their values alone."""
        group = self._group(name, scope)
        if (key := (group, self.how[name])) not in self._held:
            self._held[key] = self._joined(name, group)
        labels, together = self._held[key]
        return replace(self.open(name, labels), together=together)

    def about_all(self, name: str, scope: Scope) -> list[str]:
        """The hashes of all that is measured with a name."""
        if scope == "weight":
            return []
        group = self._group(name, scope)
        for n in group:
            if n not in self._told:
                self._told[n] = self.about(self.open(n, None))
        return [self._told[n] for n in group]

    def _joined(self, name: str, group: Names) -> tuple[Names, Together]:
        held = {n: self.open(n, None) for n in group}
        marks = [dict(zip(s.labels, s.marks, strict=True)) for s in held.values()]
        weights = dict(zip(held[name].labels, held[name].weights, strict=True))
        labels = tuple(sorted(weights, key=lambda label: ([m[label] for m in marks], weights[label])))
        return labels, Together(
            lambda: (self.open(n, labels) for n in group), sum(math.prod(s.shape) for s in held.values())
        )

    def _group(self, name: str, scope: Scope) -> Names:
        if scope == "model":
            return self.names
        layer = self._layers.get(name)
        return (name,) if layer is None else tuple(n for n in self.names if self._layers.get(n) == layer)

    @functools.cached_property
    def _layers(self) -> dict[str, int]:
        """The block that each name is in; a model without blocks has none."""
        try:
            path, _ = blocks(self.lead)
        except OptionError:
            return {}
        inside = [n for n in self.names if n.startswith(f"{path}.")]
        return {n: int(n[len(path) + 1 :].partition(".")[0]) for n in inside}
