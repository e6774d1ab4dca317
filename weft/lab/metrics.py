"""What a model is scored by, document by document: bits per byte, and retrieval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.error import FormatError, NumericError
from weft.lab.distance import ROWS, classes, fewer, padded
from weft.learn.data import IGNORE, Chat, Encoded, Example, Pair, Response, Text, encode
from weft.learn.objective import TEMPERATURE
from weft.learn.tokenizer import behind, opening
from weft.stats import forward, objective

Scores = tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]
"""A value and a weight for every document; the score is the weighted mean."""


def bits_per_byte(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, length: int = 512, batch: int = 16
) -> Scores:
    """Bits per UTF-8 byte of each text, and its bytes. Every token is predicted once, the first from what the tokenizer puts before
    texts, or from the end token.

    Long texts are cut into windows of `length` tokens, each behind that opening and the token before it.
    """
    lead, last = opening(tokenizer), tokenizer.eos_token_id
    last = tokenizer.bos_token_id if last is None else last
    start = lead or ([] if last is None else [last])
    windows: list[tuple[int, Encoded]] = []
    for k, text in enumerate(texts):
        ids = behind(tokenizer, text, lead)
        for i in range(0, len(ids), length):
            seen, cut = [*lead, ids[i - 1]] if i else start, ids[i : i + length]
            if len(seen) + len(cut) > 1:
                windows.append((k, Encoded(seen + cut, [IGNORE] * len(seen) + cut)))
    size = np.array([len(t.encode()) for t in texts], dtype=np.float64)
    return _bits(model, windows, len(texts), batch) / np.maximum(size, 1), size


def response_bits(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], *, length: int = 1024, batch: int = 8
) -> Scores:
    """Bits per byte of what each example wants answered, given its prompt, and those bytes."""
    windows = [(k, e) for k, example in enumerate(examples) for e in encode([example], tokenizer, length=length)]
    size = np.array([len(_answer(e).encode()) for e in examples], dtype=np.float64)
    return _bits(model, windows, len(examples), batch) / np.maximum(size, 1), size


def _answer(e: Example) -> str:
    if isinstance(e, Response):
        return e.response
    if isinstance(e, Chat):
        more = e.more or [""] * len(e.messages)
        return "".join(c + m for (r, c), m in zip(e.messages, more, strict=True) if r == "assistant")
    want = "prompt and response, or messages"
    raise FormatError(
        "this example has no response", where=e.name, got=type(e).__name__, want=want, fix="use other data"
    )


def _bits(model: nn.Module, windows: Sequence[tuple[int, Encoded]], count: int, batch: int) -> Float[np.ndarray, "k"]:
    """Σ -log2 p(target) of each document."""
    made = np.zeros(count)
    batch = fewer(batch, max((len(e.input_ids) for _, e in windows), default=1), classes(model))
    for part, ids, mask, labels in _rows(windows, batch):
        with torch.no_grad():
            logits = forward(model, {"input_ids": ids, "attention_mask": mask})[:, :-1].flatten(0, 1)
            target = labels[:, 1:].flatten()
            nats = torch.cat(
                [
                    F.cross_entropy(x.float(), y, ignore_index=IGNORE, reduction="none")
                    for x, y in zip(logits.split(ROWS), target.split(ROWS), strict=True)
                ]
            )
        for (k, _), total in zip(part, nats.view(len(part), -1).double().sum(1).tolist(), strict=True):
            made[k] += total / math.log(2)
    return made


def _rows(
    windows: Sequence[tuple[int, Encoded]], batch: int
) -> Iterator[tuple[list[tuple[int, Encoded]], Tensor, Tensor, Tensor]]:
    """Windows of like length together, with their padded ids, mask and labels."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][1].input_ids))
    for a in range(0, len(order), batch):
        part = [windows[i] for i in order[a : a + batch]]
        width = max(len(e.input_ids) for _, e in part)
        ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for _, e in part])
        labels = torch.tensor([e.labels + [IGNORE] * (width - len(e.labels)) for _, e in part])
        mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for _, e in part])
        yield part, ids, mask, labels


def embeddings(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, length: int = 128) -> Float[Tensor, "k d"]:
    """The normalised embedding of each text."""
    goal = objective(model)
    made: list[Tensor] = []
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for batch in padded([texts[i] for i in order], tokenizer, length=length, tokens=1 << 60, batch=32, sort=False):
        with torch.no_grad():
            made.append(goal.vectors(forward(model, batch), batch).float())
    return torch.cat(made)[torch.tensor(order).argsort()]


def similarities(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> Float[Tensor, "k k"]:
    """Cosine of each query (rows) with every positive. Errors: NumericError for embeddings that are not finite."""
    pairs = [e for e in examples if isinstance(e, Pair)]
    q = embeddings(model, tokenizer, [e.query for e in pairs])
    p = embeddings(model, tokenizer, [e.positive for e in pairs])
    cosines = q @ p.T
    if not torch.isfinite(cosines).all():
        raise NumericError(
            "embeddings are not finite",
            where=type(model).__name__,
            got="NaN or infinity",
            want="numbers",
            fix="compress less, or train at a lower rate",
        )
    return cosines


def bits_per_query(cosines: Float[Tensor, "k k"]) -> Scores:
    """-log2 of each query's positive's softmax share among all positives (0 is perfect), and weights of one.

    Where the reciprocal rank sees only changes of order, this sees every change; and it is what training lowers.
    """
    bits = -torch.log_softmax(cosines.double() / TEMPERATURE, 1).diagonal() / math.log(2)
    return bits.numpy(), np.ones(len(bits))


def reciprocal_ranks(cosines: Float[Tensor, "k k"]) -> Float[np.ndarray, "k"]:
    """1 / rank of each query's positive; among positives that score alike the rank is the expected one."""
    mine = cosines.diagonal().unsqueeze(1)
    rank = 1 + (cosines > mine).sum(1) + ((cosines == mine).sum(1) - 1) / 2
    return 1 / rank.double().numpy()


def texts_of(examples: Sequence[Example]) -> list[str]:
    """The texts of plain-text examples."""
    return [e.text for e in examples if isinstance(e, Text)]


def flips(
    model: nn.Module,
    original: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    length: int = 512,
    batch: int = 8,
) -> Scores:
    """The share of each document's targets at which the model's likeliest token is not the original's, and their number."""
    windows = [(k, e) for k, example in enumerate(examples) for e in encode([example], tokenizer, length=length)]
    changed, count = np.zeros(len(examples)), np.zeros(len(examples))
    for part, ids, mask, target in _rows(windows, fewer(batch, length, classes(model))):
        asked = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            mine, other = (forward(m, asked)[:, :-1].argmax(-1).cpu() for m in (model, original))
        at = target[:, 1:] != IGNORE
        for (k, _), differ, among in zip(part, ((mine != other) & at).sum(1), at.sum(1), strict=True):
            changed[k] += int(differ)
            count[k] += int(among)
    return changed / np.maximum(count, 1), count
