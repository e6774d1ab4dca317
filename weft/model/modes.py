"""The two ways in which a woven model runs: from its packed weights, or from dense copies of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from weft.error import OptionError
from weft.expr import Expr, dense_copy
from weft.model.weave import expressions, places

Mode = Literal["memory", "speed"]


@dataclass(frozen=True)
class Resident:
    """How a model runs, and the bytes of all its tensors, in memory or mapped from disk."""

    mode: Mode
    stored: int
    """Expressions, norms, biases: what saving writes, and buffers."""
    derived: int
    """Dense copies, and layouts that packed products have made so far."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.stored + self.derived


def mode(model: nn.Module, to: Mode | None = None) -> Resident:
    """Choose how a woven model runs, in place; returns the mode and its bytes. Without a choice it only tells them.

    memory (as models are loaded): weights stay as they are stored. Few rows of inputs are multiplied by packed kernels
    where there are some, whose layouts are made at their first use; more by weights that are made dense for the moment.
    speed: every weight has a dense copy of its frozen terms, in the dtype that the model computes in; what trains stays
    live beside it. A copy goes with its expression and is made again for the next; none is ever saved.
    Errors: OptionError for another mode; ConflictError if the model is not woven.
    """
    if to not in (None, "memory", "speed"):
        raise OptionError("unknown mode", where="mode", got=to, want="memory or speed", fix="choose one of these")
    modules: list[Any] = [model.get_submodule(path) for place in places(model).values() for path in place.modules]
    for module in modules if to is not None else ():
        cast(Expr, module.expr).drop_derived()
        module.speed = to == "speed"
    for module in modules if to == "speed" else ():
        dense_copy(module.expr, module.compute)
    now: Mode = "speed" if any(module.speed for module in modules) else "memory"
    stored = _bytes((*model.parameters(), *model.buffers()))
    kept = (t for expr in expressions(model).values() for t in expr.derived())
    return Resident(now, sum(stored.values()), sum(size for at, size in _bytes(kept).items() if at not in stored))


def _bytes(held: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, so that what is shared counts once."""
    return {t.data_ptr(): t.numel() * t.element_size() for t in held if t.numel()}
