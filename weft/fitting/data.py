"""What fit learns from and is judged by: texts to calibrate on, to choose by, to tune on and to test on, kept apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from weft.error import ConflictError, FormatError, whole
from weft.lab import metrics, tasks
from weft.lab.distance import Distance, classes, padded, windows
from weft.learn.data import Example, Pair, Response, Text, render
from weft.learn.data import fingerprint as examples_fingerprint
from weft.learn.read import read
from weft.learn.tokenizer import tokenizer
from weft.stats import Batch, objective

Kind = Literal["lm", "response", "retrieval", "distance"]


@dataclass(frozen=True)
class Data:
    """Four disjoint sets of examples, and how the last one is scored."""

    name: str
    kind: Kind
    calibration: list[Example]
    train: list[Example]
    select: list[Example]
    test: list[Example]

    @property
    def metric(self) -> tuple[str, str]:
        """Name and unit of the score; lower is better for all. Of own texts the objective is the score."""
        return {
            "lm": ("bits per byte", "bits/byte"),
            "response": ("bits per byte of the response", "bits/byte"),
            "retrieval": ("bits per query", "bits/query"),
        }[self.kind]

    def fingerprint(self) -> str:
        """Hash of every example."""
        return "-".join(
            examples_fingerprint(part)[:12] for part in (self.calibration, self.train, self.select, self.test)
        )


def resolve(source: str | None, *, embeds: bool, seed: int) -> Data:
    """The data of a lab task's name, a file or folder, or (None) weft's own calibration texts.

    A file is split by a hash of each example (equal ones are one): 80 % to tune and calibrate on, 10 % to choose by, 10 % to test on.
    Errors: FormatError for fewer than 20 examples; ConflictError where the model cannot use them.
    """
    if source is None or source in tasks.names():
        task = tasks.task(source or ("docstrings" if embeds else "python"), seed=seed)
        kind: Kind = "distance" if source is None else task.kind
        made = Data(source or "own texts", kind, task.calibration, task.train, task.select, task.test)
    else:
        made = _split(source, read(source), seed)
    if (made.kind == "retrieval") != embeds and made.kind != "distance":
        raise ConflictError(
            "this model cannot be tuned on these examples",
            where=str(source),
            got=f"{made.kind} examples, a model of {'embeddings' if embeds else 'text'}",
            want="query and positive for an embedding model; text, prompt and response or messages for a language model",
            fix="use data of the other kind, or leave out --data",
        )
    return made


def _split(source: str, examples: Sequence[Example], seed: int) -> Data:
    if len(examples) == 1 and isinstance(examples[0], Text):
        examples = _pieces(examples[0])
    unique = {hashlib.blake2b(repr(replace(e, name="")).encode(), digest_size=8).digest(): e for e in examples}
    if len(unique) < 20:
        raise FormatError(
            "too few examples to choose and test on",
            where=source,
            got=len(unique),
            want="at least 20",
            fix="give more data, or leave out --data",
        )
    order = [unique[k] for k in sorted(unique)]
    tenth = max(1, len(order) // 10)
    test, select, train = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    shuffled = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    first = order[0]
    kind: Kind = "retrieval" if isinstance(first, Pair) else "lm" if isinstance(first, Text) else "response"
    return Data(Path(source).name, kind, shuffled, shuffled, select, test)


def _pieces(text: Text, size: int = 2048) -> list[Example]:
    """One long text in pieces, cut at line ends."""
    lines, pieces, held = text.text.splitlines(keepends=True), list[Example](), ""
    for line in lines:
        held += line
        if len(held) >= size:
            pieces.append(Text(held, text.name))
            held = ""
    return [*pieces, Text(held, text.name)] if held.strip() else pieces


def texts(examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """The texts that a model reads of these examples."""
    made: list[str] = []
    for e in examples:
        if isinstance(e, Text):
            made.append(e.text)
        elif isinstance(e, Response):
            made.append(e.prompt + e.response)
        elif isinstance(e, Pair):
            made += [e.query, e.positive]
        else:
            made.append(render(e, tokenizer, tokenize=False))
    return made


def batches(
    examples: Sequence[Example], model: nn.Module, tokenizer: Any, *, length: int, tokens: int
) -> list[dict[str, Tensor]]:
    """Calibration batches of about `tokens` tokens: windows for language models, whole padded texts for embeddings.

    None is longer than the model's positions. Texts of white space alone are left out. Errors: OptionError for fewer than one token,
    FormatError for no text at all.
    """
    whole(tokens=tokens, length=length)
    length = min(length, getattr(getattr(model, "config", None), "max_position_embeddings", None) or length)
    found = [t for t in texts(examples, tokenizer) if t.strip()]
    if not found:
        where = examples[0].name if examples and examples[0].name else "calibration data"
        got, want, fix = f"{len(examples)} examples", "at least one with text", "give other data, or leave out --data"
        raise FormatError("there is no text to calibrate on", where=where, got=got, want=want, fix=fix)
    if objective(model).embeds:
        return padded(found, tokenizer, length=length, tokens=tokens)
    return windows(found, tokenizer, length=length, tokens=tokens, classes=classes(model))


def calibration(
    model: nn.Module, source: str | None, tokenizer: Any, *, tokens: int, seed: int
) -> list[dict[str, Tensor]]:
    """Calibration batches of a file, a folder, a lab task, or texts of weft's own. Errors: those of `resolve` and `batches`."""
    embeds = objective(model).embeds
    found = resolve(source or ("docstrings" if embeds else "python"), embeds=embeds, seed=seed)
    return batches(found.calibration, model, tokenizer, length=256, tokens=tokens)


def inputs_of(model: nn.Module, data: str | Sequence[Batch] | None, *, tokens: int, seed: int) -> Sequence[Batch]:
    """Batches as they are given, or those of `calibration` by the model's own tokenizer. Errors: as there; PathError without one."""
    if data is not None and not isinstance(data, str):
        return data
    return calibration(model, data, tokenizer(model), tokens=tokens, seed=seed)


def score(
    model: nn.Module, tokenizer: Any, data: Data, examples: Sequence[Example], distance: Distance
) -> metrics.Scores:
    """Scores and weights by document [k]; the metric is their weighted mean, lower is better."""
    if data.kind == "distance":
        return distance.documents(model)
    if data.kind == "retrieval":
        return metrics.bits_per_query(metrics.similarities(model, tokenizer, examples))
    if data.kind == "response":
        return metrics.response_bits(model, tokenizer, examples)
    return metrics.bits_per_byte(model, tokenizer, metrics.texts_of(examples))
