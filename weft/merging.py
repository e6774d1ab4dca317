"""Merge models in Python: several woven models in, a new one out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from weft.engine import blend as engine_blend
from weft.engine import combine as engine
from weft.engine.run import Change, Step
from weft.error import ConflictError, PathError, WeftError, whole
from weft.learn.tokenizer import source, tokenizer
from weft.progress import Progress, Silent


def combine(
    models: Sequence[nn.Module],
    method: str,
    *,
    base: nn.Module | None = None,
    weights: Sequence[float] | None = None,
    at: str | Sequence[str] = "*",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """A new woven model, frozen, that a merge (`soup`, `ties`, ...) makes of these, which are not changed.

    `weights`: one a model, 1 each if not given. `base`: the model that they were tuned from, for merges that need it. Norms,
    biases and the like are merged as weights are. What `at` does not match, the configuration and the tokenizer are those of the
    base, or of the first model. A declared fallback is a warning. Errors, all at once and before anything runs: OptionError for an
    unknown method or option, a missing base, weights out of range, a pattern that matches nothing; ConflictError and ShapeError for
    models of other families, configurations, vocabularies, weights, shapes or ties. Then NumericError naming weight and model.
    """
    how: dict[str, Any] = {"base": base, "weights": weights, "at": at, "seed": seed, "progress": progress}
    made, _, fallbacks = combined(models, method, **how, **options)
    for where, what in fallbacks:
        warnings.warn(f"{where}: {what}", stacklevel=2)
    return made


def combined(
    models: Sequence[nn.Module],
    method: str,
    *,
    base: nn.Module | None = None,
    weights: Sequence[float] | None = None,
    at: str | Sequence[str] = "*",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[nn.Module, list[Change], list[tuple[str, str]]]:
    """What `combine` gives, what became of each site, and the declared fallbacks: (where, what). Errors: as there."""
    whole(0, seed=seed)
    step = Step.of(method, **options)
    strange = other_words([*([base] if base is not None else []), *models])
    with (progress or Silent()).bar(method, engine.reach(models, at, base)) as done:
        return engine.run(models, step, base=base, weights=weights, at=at, seed=seed, strange=strange, done=done)


def blend_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    into: str,
    method: str = "linear",
    *,
    rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Add an adapter `into`, in place, that is a blend of these at their weights, whatever strength they have now; returns its sites.

    linear: Σ weight · adapter, exact: low-rank terms side by side as one, sparse ones as one, any others as they are, sharing
    tensors with them. Any other: a merge (`ties`, `dare` ...) of what the adapters add, with its options; a plain matrix, or its best
    approximation of `rank`. It is frozen, and the others stay as they are.
    Errors: OptionError for unknown names and methods, and a name that is none; ConflictError for one that is taken, for branches,
    and for adapters under a magnitude.
    """
    return engine_blend.run(model, weights, into, method, rank=rank, seed=seed, options=options)


def other_words(models: Sequence[nn.Module]) -> list[WeftError]:
    """A ConflictError for each model whose tokenizer gives texts other ids than the first one's; one without says nothing."""
    held = {where: words for m in models if (where := source(m)) and (words := _words(m)) is not None}
    first = next(iter(held), "")
    return [
        ConflictError(
            "these models have other tokenizers",
            where=where,
            got=f"another {', another '.join(k for k in words if words[k] != held[first].get(k))}",
            want=f"those of {first}",
            fix="merge models of one vocabulary",
        )
        for where, words in held.items()
        if words != held[first]
    ]


def _words(model: nn.Module) -> dict[str, Any] | None:
    """What decides on the ids of a text; None without a tokenizer."""
    try:
        words = tokenizer(model)
    except PathError:
        return None
    if not words.is_fast:
        return {"vocabulary": words.get_vocab()}
    held = json.loads(words.backend_tokenizer.to_str())
    return {k: held.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
