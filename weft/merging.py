"""Merge models in Python: several woven models in, a new one out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from weft.engine import blend as engine_blend
from weft.engine import coefficients
from weft.engine import combine as engine
from weft.engine.align import by_tokens
from weft.engine.coefficients import Tried, Way
from weft.engine.run import Change, Step
from weft.error import ConflictError, OptionError, PathError, WeftError, whole
from weft.learn.data import Example
from weft.learn.tokenizer import source, tokenizer
from weft.progress import Progress, Silent
from weft.stats import Batch, collect, fishers
from weft.store.cache import Cache, default
from weft.store.save import WORDS, save, travelling
from weft.store.swap import digest

Data = str | Sequence[Batch]
"""Texts by the name of a file, a folder or a lab task; or batches of a model's inputs."""
Align = Literal["tokens"]
"""How models of other vocabularies are brought beside the first."""


@dataclass(frozen=True)
class Outcome:
    """What became of each site, the declared fallbacks (where, what), and what a search of weights tried."""

    changes: list[Change]
    fallbacks: list[tuple[str, str]]
    tried: list[Tried]


@dataclass(frozen=True)
class Combined(Outcome):
    """That, and the merged model."""

    model: nn.Module


@dataclass(frozen=True)
class Planned:
    """A merge that can be done: models were compared, and weights were searched."""

    plan: engine.Plan
    tried: list[Tried]
    progress: Progress

    def run(self) -> Combined:
        """The merged model. Errors: NumericError naming weight and model."""
        model, changes = _run(self.plan, self.progress)
        return Combined(changes, self.plan.merge.notes, self.tried, model)

    def write(self, out: str | Path, **how: Any) -> Outcome:
        """The folder that `save` writes of the merged model; it says what `how` may be.

        In memory are one weight, and slices of the members'. Of members that are plain matrices, each is made when it is written, and a
        run that was killed goes on when it is called again; of others, plain results lie on disk until then. Errors: as `run` and `save`.
        """
        changes = list[Change]()
        model, values = engine.begin(self.plan, changes, Path(out))
        save(model, out, **how, values=values, progress=self.progress)
        return Outcome(changes, self.plan.merge.notes, self.tried)


def combine(models: Sequence[nn.Module], method: str, **how: Any) -> nn.Module:
    """The new woven model, frozen, that a merge makes of these; fallbacks are warnings. `how` and errors: as `planned`."""
    made = combined(models, method, **how)
    _warn(made)
    return made.model


def combined(models: Sequence[nn.Module], method: str, **how: Any) -> Combined:
    """That model, and what became of each site; `planned` says what `how` may be. Errors: as there."""
    return planned(models, method, **how).run()


def combine_to(
    out: str | Path, models: Sequence[nn.Module], method: str, *, replace: bool = False, **how: Any
) -> Outcome:
    """That model as a folder, written weight by weight, with little memory (`Planned.write`). Fallbacks are warnings. Errors: as there."""
    made = planned(models, method, **how).write(out, replace=replace)
    _warn(made)
    return made


def _warn(made: Outcome) -> None:
    for where, what in made.fallbacks:
        warnings.warn(f"{where}: {what}", stacklevel=3)


def planned(
    models: Sequence[nn.Module],
    method: str,
    *,
    base: engine.Base = None,
    weights: Sequence[float] | None = None,
    at: str | Sequence[str] = "*",
    per: engine.Per | None = None,
    align: Align | None = None,
    dtype: torch.dtype | None = None,
    data: Data | Sequence[Data] | None = None,
    tokens: int = 16384,
    search: Way | None = None,
    held_out: str | Sequence[Example] | None = None,
    trials: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Planned:
    """A merge (`soup`, `ties`, ...) of these models, which are not changed, into a new one.

    `weights`: one a model, 1 each if not given. `base`: the model that they were tuned from, for merges that need it, or one for each,
    the first of which is what they are added to; or what they are added to, then one for each. Norms, biases and the like are merged as
    weights are. What `at` does not match, the configuration and the tokenizer are those of the base, or of the first model. A merge that
    has to know the members' inputs (`regmean`, `fisher`, ...) reads `tokens` tokens of `data`, one for all or one for each, and of weft's
    own texts without; what it finds out stays in `cache`. `per` gives options and weights by the name of a weight, in place of `options`
    and `weights`. Vocabularies that differ are refused, or with `align="tokens"` aligned by token to that of the base, or of the
    first model, whose tokenizer the result has; what is lost is a fallback. `dtype` is what dense results are stored in, rather than in
    the base's.
    `search` finds weights by the score on `held_out`, a file, a folder, a lab task's name or examples: `grid` from the first of two
    models to the second, `greedy` from the best on, `cma` by evolution, of `trials` merges. A trial takes a merge and a pass over
    `held_out`; of adapters on one base, no weight is made dense. The model has the best weights of those tried.
    Errors, all at once and before anything runs: OptionError for an unknown method or option, a missing base, weights out of range,
    a pattern that matches nothing; ConflictError and ShapeError for models of other families, configurations, vocabularies, weights,
    shapes or ties. Then NumericError naming weight and model.
    """
    whole(0, seed=seed)
    step, bars = Step.of(method, **options), progress or Silent()
    given, notes = [*engine.bases_of(base), *models], list[tuple[str, str]]()
    strange = other_words(given) if align is None else []
    look = _look(models, step, data, tokens, seed, Cache(cache or default()), bars)
    score = _score(search, held_out, trials, weights, len(models))

    if align is not None and models:
        given, notes = _aligned(given, list(engine.named(models, engine.bases_of(base))), step)
    bases, members = given[: len(given) - len(models)], given[len(given) - len(models) :]

    def plan(shares: Sequence[float] | None) -> engine.Plan:
        how: dict[str, Any] = {"weights": shares, "at": at, "per": per, "dtype": dtype, "seed": seed, "look": look}
        made = engine.plan(members, step, base=bases or None, strange=strange, **how)
        made.merge.notes.extend(notes)
        return made

    if search is None or score is None:
        return Planned(plan(weights), [], bars)
    tried = coefficients.search(search, len(models), lambda w: score(_run(plan(w), bars)[0]), trials=trials, seed=seed)
    return Planned(plan(coefficients.best(tried).weights), tried, bars)


def _aligned(
    models: Sequence[nn.Module], labels: Sequence[str], step: Step
) -> tuple[list[nn.Module], list[tuple[str, str]]]:
    """The models, all with the tokens of the first. Errors: OptionError for a merge that weighs rows by data; those of `by_tokens`."""
    if "fisher" in step.needs:
        got, want, fix = step.describe(), "a merge that weighs no rows by data", "choose another merge"
        raise OptionError("what data says is not aligned by tokens", where="align", got=got, want=want, fix=fix)
    made, notes = by_tokens(models[0], models[1:], labels[1:])
    return [models[0], *made], notes


def _run(plan: engine.Plan, bars: Progress) -> tuple[nn.Module, list[Change]]:
    with bars.bar(plan.merge.step.method, len(plan.sites)) as done:
        return engine.run(plan, done)


def _score(
    search: Way | None,
    held_out: str | Sequence[Example] | None,
    trials: int | None,
    weights: Sequence[float] | None,
    count: int,
) -> Callable[[nn.Module], float] | None:
    """What a search goes by; None without one. Errors: OptionError for a call that has one of search and held-out data, and as `check`."""
    if search is None or held_out is None:
        if search is not None or held_out is not None or trials is not None:
            got = "a search and nothing to score on" if search is not None else "held-out data or trials and no search"
            want, fix = "both search and held_out, or neither", "give the other"
            raise OptionError("weights cannot be searched", where="search, held_out", got=got, want=want, fix=fix)
        return None
    if weights is not None:
        raise OptionError(
            "weights are what is searched", where="weights", got=weights, want="none", fix="leave one out"
        )
    coefficients.check(search, count, trials)
    from weft.score import evaluate, examples

    found = examples(held_out, "test") if isinstance(held_out, str) else held_out
    return lambda model: float(evaluate(model, found)["mean"])


def _look(
    models: Sequence[nn.Module],
    step: Step,
    data: Data | Sequence[Data] | None,
    tokens: int,
    seed: int,
    cache: Cache,
    progress: Progress,
) -> Callable[[int], engine.Seen] | None:
    """How the engine finds what data says of a member; None for a merge that does not ask. Errors: OptionError."""
    needs = step.needs & {"gram", "fisher"}
    if not needs:
        if data is not None:
            got, want, fix = "data", f"none: {step.describe()} looks at weights alone", "leave it out"
            raise OptionError("this merge reads no data", where="data", got=got, want=want, fix=fix)
        return None
    one = data is None or isinstance(data, str) or all(isinstance(d, Mapping) for d in data)
    held = [cast("Data | None", data)] * len(models) if one else list(cast(Sequence[Data], data))
    if len(held) != len(models):
        got, want = f"{len(held)} for {len(models)} models", "one for all, or one a model"
        raise OptionError("data does not fit the members", where="data", got=got, want=want, fix="give as many")

    from weft.fitting.data import inputs_of

    @once
    def look(i: int) -> engine.Seen:
        found = inputs_of(models[i], held[i], tokens=tokens, seed=seed)
        stats = (
            collect(models[i], found, cache.folder / "evidence", seed=seed, progress=progress)
            if "gram" in needs
            else None
        )
        return engine.Seen(stats, fishers(models[i], found, cache, seed=seed) if "fisher" in needs else {})

    return look


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
    if len({_word_files(m) for m in models}) == 1:
        return []
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


def _word_files(model: nn.Module) -> str:
    """The hashes of a tokenizer's files, which take less than reading it; of a model that came from no folder, a name of its own."""
    if not (folder := source(model)) or not Path(folder).is_dir():
        return str(id(model))
    return repr(sorted((name, digest(path)["blake2b"]) for name, path in travelling(Path(folder), WORDS).items()))


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
