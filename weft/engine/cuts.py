"""Run methods that take whole blocks out of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.engine.registry import get
from weft.engine.run import Change, Step
from weft.error import ConflictError, OptionError
from weft.model import cut, expressions, fork, stack_of
from weft.progress import Progress
from weft.stats import Batch, forward, influence, without
from weft.stats.evidence import key
from weft.store.cache import Cache


@dataclass(frozen=True)
class Tower:
    """A model's stack of blocks as a method sees it that takes some of them out."""

    path: str
    influence: Float[Tensor, "blocks"]
    """How much each changes the hidden state: 1 - E[cos(x, y)], x and y a token's before and behind it."""
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Declared fallbacks: (where, what)."""

    def __len__(self) -> int:
        return len(self.influence)

    def fallback(self, what: str) -> None:
        """Declare that the method could not do what it says here, and what it did instead."""
        self.notes.append((self.path, what))


def run(
    model: nn.Module,
    step: Step,
    batches: Sequence[Batch],
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> tuple[list[Change], list[tuple[str, str]]]:
    """Take out the blocks that a method chooses, in place: a change for each, by its name before, and the fallbacks.

    The first batch shows that the smaller model gives what this one gives where those blocks hand on what they are given.
    Errors, before anything changes: those of the method, of `cut` and of `influence`; OptionError for a method of another kind and
    without batches; ConflictError where the first batch shows another output.
    """
    method = get(step.method)
    if method.kind != "cut":
        want, fix = "a cut", "weft methods shows kinds"
        raise OptionError("this method takes no blocks out", where=method.name, got=method.kind, want=want, fix=fix)
    if not batches:
        want, fix = ", ".join(sorted(method.needs)), "pass data"
        raise OptionError("this method needs calibration data", where=method.name, got="no data", want=want, fix=fix)
    path, _ = stack_of(model)
    tower = Tower(path, torch.tensor(_measured(model, batches, cache, progress), dtype=torch.float64))
    gone = sorted(method(tower, **dict(step.options)))
    if gone:
        _check(model, batches[0], gone)
    sizes = {i: _bytes(model, f"{path}.{i}.") for i in gone}
    cut(model, gone)
    said = [f"block of influence {float(tower.influence[i]):.4f}, {sizes[i]} bytes" for i in gone]
    return [Change(f"{path}.{i}", what, "taken out", 0, None) for i, what in zip(gone, said, strict=True)], tower.notes


def _measured(
    model: nn.Module, batches: Sequence[Batch], cache: Cache | None, progress: Progress | None
) -> list[float]:
    """The influence of every block, from the cache if it is there."""

    def make() -> list[float]:
        return influence(model, batches, progress=progress).tolist()

    return make() if cache is None else cache.json("influence", key(model, batches, 0, False), make)


def _check(model: nn.Module, batch: Batch, gone: Sequence[int]) -> None:
    """Errors: ConflictError if the smaller model is not this one without these blocks."""
    want = without(model, batch, gone)
    small = fork(model)
    cut(small, gone)
    with torch.no_grad():
        gap = float((forward(small, batch) - want).abs().max() / want.abs().max().clamp(min=1e-9))
    if not gap < 1e-4:
        raise ConflictError(
            "a block computes something else in its new place",
            where=type(model).__name__,
            got=f"output off by {gap:.1e} of its largest value",
            want="that of the model whose blocks hand on what they are given",
            fix="take other blocks out, or prune by channels, heads or weights",
        )


def _bytes(model: nn.Module, prefix: str) -> int:
    """The bytes of the weights whose names begin so."""
    return sum(e.nbytes() for n, e in expressions(model).items() if n.startswith(prefix))
