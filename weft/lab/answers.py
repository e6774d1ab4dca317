"""How well a model answers, document by document: exact match, choices by likelihood, and whether it knows how sure to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from weft.error import ConflictError, FormatError, ShapeError, whole
from weft.lab.distance import classes, fewer
from weft.lab.metrics import Scores, response_bits
from weft.learn.data import IGNORE, Example, Response, encode


def exact_match(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, length: int = 1024, batch: int = 32
) -> Scores:
    """1 for each example whose response is what the model writes after the prompt, greedily, else 0; and weights of one.

    White space around it does not count. An answer may take twice the tokens of the response and two more, its end among them.
    Errors: FormatError for examples that are no prompt and response; ConflictError for a tokenizer without an end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        got, want, fix = "no end token", "one: it tells where an answer ends", "set eos_token in the tokenizer's files"
        raise ConflictError("answers have no end", where=type(tokenizer).__name__, got=got, want=want, fix=fix)
    asked: list[tuple[list[int], int, int]] = []
    for k, e in enumerate(_responses(examples)):
        (made,) = encode([e], tokenizer, length=length)
        prompt = [i for i, label in zip(made.input_ids, made.labels, strict=True) if label == IGNORE]
        asked.append((prompt or [end], len(made.input_ids) - len(prompt), k))
    right = np.zeros(len(asked))
    for width, group in groupby(sorted(asked, key=lambda a: len(a[0])), key=lambda a: len(a[0])):
        rows = list(group)
        size = fewer(batch, width, classes(model))
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            said = _written(model, [p for p, _, _ in part], 2 * max(n for _, n, _ in part) + 2, end)
            for (_, _, k), ids in zip(part, said, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                right[k] = text.strip() == _responses([examples[k]])[0].response.strip()
    return right, np.ones(len(asked))


def _written(model: nn.Module, prompts: Sequence[list[int]], most: int, end: int) -> list[list[int]]:
    """What the model writes after prompts of one length, up to its end token."""
    ids = torch.tensor(prompts, device=next(model.parameters()).device)
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": end, "pad_token_id": end}
    with torch.no_grad():
        made: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **how)  # type: ignore[operator]
    rows: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _responses(examples: Sequence[Example]) -> list[Response]:
    """The examples. Errors: FormatError if one is no prompt and response."""
    for e in examples:
        if not isinstance(e, Response):
            want, fix = "prompt and response", "use other data"
            raise FormatError("this example has no one answer", where=e.name, got=type(e).__name__, want=want, fix=fix)
    return [e for e in examples if isinstance(e, Response)]


def choice_shares(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], choices: Sequence[str]
) -> Float[np.ndarray, "k c"]:
    """How likely each choice is after each prompt, among the choices: softmax over them of log p(choice, end | prompt).

    Errors: OptionError for fewer than two choices; FormatError for examples that are no prompt and response.
    """
    whole(2, choices=len(choices))
    asked = [Response(e.prompt, choice, e.name) for e in _responses(examples) for choice in choices]
    bits, size = response_bits(model, tokenizer, asked)
    nats = (bits * size).reshape(-1, len(choices)) * -math.log(2)
    shares = np.exp(nats - nats.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def choice_accuracy(shares: Float[np.ndarray, "k c"], right: Sequence[int]) -> Scores:
    """1 where the right choice is the likeliest, else 0, and weights of one; where t choices tie for it, 1 / t."""
    best = shares == shares.max(1, keepdims=True)
    mine = best[np.arange(len(shares)), list(right)]
    return mine / best.sum(1), np.ones(len(shares))


def calibration_error(shares: Float[np.ndarray, "k c"], right: Sequence[int], bins: int = 10) -> Scores:
    """Expected calibration error as a mean over documents: Σ_b (k_b / k) · |accuracy_b − confidence_b|, and weights of one.

    A document's confidence is its largest share, and bin b holds those in ((b − 1) / bins, b / bins]. Its value is its bin's
    sign of (accuracy − confidence), times (its own accuracy − its own confidence), so that the mean is the error. Resampled,
    the signs stay those of the whole set.
    """
    whole(bins=bins)
    sure, correct = shares.max(1), choice_accuracy(shares, right)[0]
    at = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(at, correct - sure, minlength=bins)
    return np.sign(gap)[at] * (correct - sure), np.ones(len(shares))


def forgetting(before: Scores, after: Scores) -> Scores:
    """How much higher each document's loss is after tuning than before, and its weight; above zero, something was lost.

    Errors: ShapeError for scores of other documents.
    """
    if before[1].shape != after[1].shape or not np.array_equal(before[1], after[1]):
        want, fix = "the same documents, in order", "score both on the same examples"
        got = f"{len(before[1])} and {len(after[1])} documents, or other weights"
        raise ShapeError("losses cannot be compared", where="forgetting", got=got, want=want, fix=fix)
    return after[0] - before[0], after[1]
