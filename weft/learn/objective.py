"""What training lowers: the targets' negative log likelihood, pairs apart from other pairs, or the distance to an original."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from weft.learn.data import IGNORE

TEMPERATURE = 0.05
"""Cosines are divided by this before the softmax over positives."""


def likelihood(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"], count: int | Tensor | None, smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Σ -log p(target) over the batch's targets, divided by `count`, the targets of the whole step (None: of this batch). Nats a token.

    With `smoothing` s a target is (1 - s) itself, and s the mean of all tokens.
    """
    targets, flat = labels[:, 1:].flatten(), logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return total / (count if count is not None else (targets != IGNORE).sum().clamp(min=1))


def predictions(
    logits: Float[Tensor, "b t v"], labels: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, "u v"], Int[Tensor, "u"]]:
    """The logits that predict targets, and the targets."""
    kept = labels[:, 1:] != IGNORE
    return logits[:, :-1][kept].float(), labels[:, 1:][kept]


def contrast(
    queries: Float[Tensor, "b d"], positives: Float[Tensor, "b d"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """InfoNCE over the batch: each normalised query against all positives, targets smoothed as above. Nats a query."""
    scores = queries @ positives.T / TEMPERATURE
    targets = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores.float(), targets, label_smoothing=smoothing)


def contrasted(
    queries: Float[Tensor, "b d"], positives: Float[Tensor, "b d"], training: bool, smoothing: float
) -> Float[Tensor, ""]:
    """The contrast as training lowers it, with every process's rows and targets smoothed, or else of these rows alone."""
    if not training:
        return contrast(queries, positives)
    return contrast(everyones(queries), everyones(positives), smoothing)


def everyones(vectors: Float[Tensor, "b d"]) -> Float[Tensor, "B d"]:
    """These rows of every process, in order; where each lowers a loss of them all, the mean of their gradients is the loss's gradient."""
    if not dist.is_initialized() or (count := dist.get_world_size()) == 1:
        return vectors
    rows = [torch.empty_like(vectors) for _ in range(count)]
    dist.all_gather(rows, vectors.detach().contiguous())
    rows[dist.get_rank()] = _Times.apply(vectors, count)  # those of others are constants here
    return torch.cat(rows)


class _Times(torch.autograd.Function):
    """The same values; gradients times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.count, None
