"""Taps on the edges of a model: who may have one, putting one on, taking it off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from weft.error import ConflictError, ShapeError, WeftError, raise_all
from weft.model.sites import match
from weft.model.taps import Tap, unmoved
from weft.model.weave import Place, expressions, places, set_expressions, tap_at


def refusals(model: nn.Module, names: Iterable[str]) -> list[WeftError]:
    """Why sites cannot have taps: they have no activation edge, or one that is read in another way than by a product."""
    return [p for n in names if (p := _refusal(model, places(model)[n])) is not None]


def _refusal(model: nn.Module, place: Place) -> WeftError | None:
    reasons = {
        "embedding": "an embedding looks rows up: it has no activation edge"
        + (" (and the weight is tied to it)" if len(place.modules) > 1 else ""),
        "conv": "a convolution reads its input in patches that overlap, not token by token",
    }
    tables = [p for p in place.modules if isinstance(model.get_submodule(p), nn.Embedding)]
    kind = "embedding" if tables else place.kind
    if kind not in reasons:
        return None
    fix = 'leave the site out (at="all-linear")'
    return ConflictError(
        "this site has no place for a tap", where=place.name, got=reasons[kind], want="a linear layer", fix=fix
    )


def set_taps(model: nn.Module, given: Mapping[str, Tap | None]) -> None:
    """Put these taps on the inputs of sites, as they are, weights untouched; None takes one off.

    Sites that read one input are given one and the same object. Errors, before anything changes: ConflictError for
    embeddings, what is tied to them, and convolutions; ShapeError for turns of another size.
    """
    problems = refusals(model, [n for n, tap in given.items() if tap is not None])
    for name, tap in given.items():
        n = expressions(model)[name].shape[1]
        if tap is not None and any(t.shape[0] != n for t in tap.turns()):
            got, fix = tap.turns()[0].shape[0], "turn as many features as the site reads"
            problems.append(ShapeError("a turn does not fit", where=name, got=got, want=n, fix=fix))
    raise_all(problems)
    for name, tap in given.items():
        for path in places(model)[name].modules:
            cast(Any, model.get_submodule(path)).tap = tap


def untap(model: nn.Module, at: str | Iterable[str] = "*") -> list[str]:
    """Take the taps off the sites that `at` matches, in place: turns go back into the weights, roundings end. Returns the sites.

    Errors: OptionError for a pattern that matches nothing.
    """
    found = {n: tap for n in match(model, at) if (tap := tap_at(model, places(model)[n])) is not None}
    now = expressions(model)
    set_expressions(model, {n: unmoved(now[n], tap) for n, tap in found.items()})
    set_taps(model, dict.fromkeys(found))
    return list(found)
