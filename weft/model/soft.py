"""From what trains towards packed weights to the packed weights."""

from __future__ import annotations

from torch import nn

from weft.model.weave import expressions, set_expressions


def harden(model: nn.Module) -> list[str]:
    """Make what a method of kind relax left in weights what it trained towards, in place: packed, frozen, of the same value.

    Returns the sites. Adapters beside it stay.
    """
    made = {name: hard for name, expr in expressions(model).items() if (hard := expr.hard()) is not expr}
    set_expressions(model, made)
    return list(made)
