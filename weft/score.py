"""Use a model: its tokenizer, its score on examples, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from weft.error import ConflictError, NumericError, whole
from weft.lab import metrics, tasks
from weft.lab.answers import exact_match
from weft.lab.bootstrap import interval
from weft.learn.data import Chat, Example, Pair, Text, render
from weft.learn.read import read
from weft.learn.suits import suits, writes
from weft.learn.tokenizer import tokenizer


def examples(source: str, part: Literal["train", "test"], seed: int = 0) -> list[Example]:
    """That part of a lab task, or all examples of a file or folder. Errors: PathError, FormatError."""
    return getattr(tasks.task(source, seed=seed), part) if source in tasks.names() else read(source)


def evaluate(
    model: nn.Module, task: str | Sequence[Example], *, limit: int | None = None, length: int = 512
) -> dict[str, Any]:
    """The model's score on a lab task, a file of examples, or examples: the mean with its 95 % bootstrap interval over documents.

    `limit` takes the first documents only. Lower is better for this score. Lab tasks with answers also tell the share that the
    model writes exactly. Errors: ConflictError for examples that do
    not suit the model; OptionError; PathError; FormatError; NumericError for a score that is not finite.
    """
    whole(length=length, **({} if limit is None else {"limit": limit}))
    said = task if isinstance(task, str) else "examples"
    found = (examples(task, "test") if isinstance(task, str) else list(task))[:limit]
    whole(examples=len(found))
    first, words = found[0], tokenizer(model)
    suits(model, first, said, "scored")
    more: dict[str, float] = {}
    if isinstance(first, Pair):
        cosines = metrics.similarities(model, words, found)
        name, (values, weights) = "bits per query", metrics.bits_per_query(cosines)
        more = {"mean reciprocal rank": float(metrics.reciprocal_ranks(cosines).mean())}
    elif isinstance(first, Text):
        texts = metrics.texts_of(found)
        name, (values, weights) = "bits per byte", metrics.bits_per_byte(model, words, texts, length=length)
    else:
        name = "bits per byte of the response"
        values, weights = metrics.response_bits(model, words, found, length=length)
        if task in tasks.names():
            more = {"exact match": float(exact_match(model, words, found, length=length)[0].mean())}
    if not np.isfinite(values).all():
        where, fix = f"{type(model).__name__} on {said}", "look for huge weights; weft verify checks the folder"
        raise NumericError("a score is not finite", where=where, got="NaN or infinity", want="numbers", fix=fix)
    return {
        "task": said,
        "metric": name,
        "documents": len(found),
        **interval(values[None], weights[None]).as_json(),
        **more,
    }


def generate(model: nn.Module, prompt: str, max_new_tokens: int = 64, *, chat: bool = False, **options: Any) -> str:
    """What the model writes after the prompt, greedily unless `options` of transformers' `generate` say otherwise.

    `chat`: the prompt is what a user says, in the tokenizer's chat template.
    Errors: ConflictError for a model that generates no text; FormatError for a chat without a template; OptionError.
    """
    whole(max_new_tokens=max_new_tokens)
    if not writes(model):
        raise ConflictError(
            "this model generates no text",
            where=type(model).__name__,
            got="no language model head",
            want="a causal language model",
            fix="weft eval scores embedding models",
        )
    words = tokenizer(model)
    said = render(Chat((("user", prompt),)), words, add_generation_prompt=True) if chat else words(prompt)["input_ids"]
    asked = torch.tensor([said], device=next(model.parameters()).device)
    how = {"attention_mask": torch.ones_like(asked), "max_new_tokens": max_new_tokens, "do_sample": False, **options}
    with torch.no_grad():
        ids = model.generate(asked, **how)[0]  # type: ignore[operator]
    apart = getattr(model.config, "is_encoder_decoder", False)
    return words.decode(ids if apart else ids[len(said) :], skip_special_tokens=True)
