"""The pretrained model beside one that was changed."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from weft.expr import Dense, terms_of
from weft.model.branch import unbranch
from weft.model.weave import Model, Place, expression, first_vectors, fork, places, set_expressions


def pretrained(model: Model) -> Model:
    """A second model with the pretrained values, frozen, without adapters, branches and taps.

    Weights that still stand as they were are the model's own, and take no memory; compressed ones are read from where they came from.
    Errors: those of reading them, PathError and ChangedError.
    """
    made = fork(model)
    unbranch(made)
    set_expressions(made, {name: _first(made, place) for name, place in places(made).items()})
    for place in places(made).values():
        for path in place.modules:
            cast(Any, made.get_submodule(path)).tap = None
    for name, first in first_vectors(made).items():
        p = made.get_parameter(name)
        p.data = first().to(p).clone()
    return made.requires_grad_(False).eval()


def _first(model: nn.Module, place: Place) -> Dense:
    """The pretrained value of a weight: its base, where that is it."""
    first, base = place.original().detach(), terms_of(expression(model, place)).get("base")
    if isinstance(base, Dense) and base.frozen() and torch.equal(base.w, first.to(base.w)):
        return base
    return Dense(first)
