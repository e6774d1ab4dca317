"""Smoothed labels: the loss of targets that all tokens share a part of, in training and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import weft
from weft.learn.data import IGNORE, Pair, Response
from weft.learn.objective import contrast, likelihood
from weft.learn.train import train
from weft.model import weave

EXAMPLES = [Response("the red cat sat ?", " ran"), Response("a dog ran ?", " sat")] * 4


def test_the_loss_is_that_of_shared_targets() -> None:
    """Σ over targets of -Σ_v q_v log p_v, q a tenth spread over all tokens; what is no target counts for nothing."""
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 5, generator=g), torch.tensor([[0, 1, IGNORE, 3], [IGNORE, 4, 2, IGNORE]])
    want, count = 0.0, 0
    for b in range(2):
        for t in range(1, 4):
            if (target := int(labels[b, t])) != IGNORE:
                row = logits[b, t - 1].double().tolist()
                norm = math.log(sum(math.exp(x) for x in row))
                want -= sum((0.1 / 5 + 0.9 * (v == target)) * (x - norm) for v, x in enumerate(row))
                count += 1
    assert float(likelihood(logits, labels, None, 0.1)) == pytest.approx(want / count, rel=1e-5)
    assert float(likelihood(logits, labels, 7, 0.1)) == pytest.approx(want / 7, rel=1e-5)
    q = torch.nn.functional.normalize(torch.randn(3, 4, generator=g), dim=-1)
    even = -torch.log_softmax(q @ q.T / 0.05, -1)
    assert float(contrast(q, q, 0.3)) == pytest.approx(
        float((0.7 * even.diagonal() + 0.3 * even.mean(1)).mean()), rel=1e-4
    )


def test_held_out_scores_are_of_whole_targets(tiny: Any, words: Any) -> None:
    """At a rate that changes nothing the held-out loss is the same with and without; the training loss is not."""
    made = []
    for smoothing in (0.0, 0.2):
        model = weave(tiny("llama", max_position_embeddings=64))
        weft.apply(model, "lora", rank=2)
        how: dict[str, Any] = {"steps": 1, "batch": 4, "length": 32, "lr": 1e-12, "label_smoothing": smoothing}
        made.append(train(model, EXAMPLES, tokenizer=words, held_out=[Response("the cat saw ?", " ran")], **how))
    plain, smooth = made
    assert plain.held_out == smooth.held_out and plain.losses != smooth.losses


def test_pairs_are_smoothed(tiny: Any, words: Any) -> None:
    """And shares out of range are refused."""
    model = weave(tiny("bert"))
    weft.apply(model, "lora", rank=2)
    pairs = [Pair("the cat sat", "a cat sat"), Pair("a dog ran", "the dog ran")] * 2
    losses = [
        train(weft.fork(model), pairs, tokenizer=words, steps=1, batch=2, length=16, label_smoothing=s).losses
        for s in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]
    with pytest.raises(weft.WeftError, match="label_smoothing"):
        train(model, pairs, tokenizer=words, label_smoothing=1.0)
