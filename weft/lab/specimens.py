"""The lab models as their realism cards see them: inputs to watch, and what held-out items score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from weft.error import ResourceError
from weft.lab import made, metrics, models
from weft.lab.realism import Specimen
from weft.lab.subjects import installed
from weft.lab.trial import Trial, task_of
from weft.learn.data import Pair
from weft.progress import Progress
from weft.store.cache import Cache, default
from weft.store.load import load

DOCUMENTS, PAIRS = 16, 200
"""Held-out items that a language or an embedding model's losses are measured on."""


def specimens(names: Sequence[str] | None = None, progress: Progress | None = None) -> Iterator[Specimen]:
    """These lab models, made where they have to be; if not given all that what is installed allows.

    Errors: OptionError for an unknown one; ResourceError for one that was asked for and needs what is not installed.
    """
    for name in models.names() if names is None else names:
        try:
            yield specimen(name, progress)
        except ResourceError:
            if names is not None:
                raise


def specimen(name: str, progress: Progress | None = None) -> Specimen:
    """The lab model of that name. Errors: those of `specimens`."""
    base, dash, _ = name.partition("-stress")
    if base in made.NAMES:
        recipe = made.get(base)
        model = load(Path(models.resolve(name, progress)))
        return Specimen(name, model, recipe.batches(), recipe.score, recipe.metric, bool(dash))
    (subject,) = installed([base])
    trial = Trial(subject, 0, Cache(default()), "")
    return of(trial, name, load(Path(models.resolve(name)))) if dash else of(trial)


def of(trial: Trial, name: str | None = None, model: nn.Module | None = None) -> Specimen:
    """A model that claims are tried on, or a variant of it: the trial's calibration data, the first test documents."""
    subject = trial.subject
    test, words = task_of(subject.distance_task, 0).test, subject.tokenizer
    pairs, texts = [e for e in test if isinstance(e, Pair)][:PAIRS], metrics.texts_of(test)[:DOCUMENTS]

    def by_query(model: nn.Module) -> metrics.Scores:
        return metrics.bits_per_query(metrics.similarities(model, words, pairs))

    def by_byte(model: nn.Module) -> metrics.Scores:
        return metrics.bits_per_byte(model, words, texts, length=subject.length)

    score, metric = (by_query, "bits per query") if subject.embeds else (by_byte, "bits per byte")
    stress = model is not None
    return Specimen(name or subject.name, model or subject.model, trial.batches, score, metric, stress)
