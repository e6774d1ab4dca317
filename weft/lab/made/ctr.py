"""ref-ctr: a click-through model on a generated click log, of which the best possible score is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.lab.made.recipe import Recipe, bits, logits_of, pick
from weft.lab.metrics import Scores
from weft.nets import CrossNetwork, CrossNetworkConfig

FIELDS = (4, 12, 40, 120, 400, 1200, 2400, 4800)
"""Categories of each field, the most frequent first."""
POWER = 1.1
"""The r-th of a field is drawn in proportion to r to the minus this."""
FACTORS = 4
SINGLE, PAIR = 0.35, 0.3
"""Standard deviations of a category's weight, and of each of its factors."""
BIAS = -2.0
LOG, HELD_OUT = 1_000_000, 10_000
"""Impressions to train on, and others."""
BATCH = 512


@dataclass(frozen=True)
class Log:
    """Impressions: a category of each field as a row of the table of all, whether it was clicked, and the planted logit."""

    ids: Int[Tensor, "k f"]
    clicks: Int[Tensor, "k"]
    logits: Float[Tensor, "k"]


@dataclass(frozen=True)
class Clicks:
    """Disjoint logs, the same ones always."""

    train: Log
    test: Log


def clicks() -> Clicks:
    """The logs, drawn once."""
    return _drawn(LOG)


@cache
def _drawn(size: int) -> Clicks:
    """The planted model and its logs: logit = BIAS + sum of w_i + sum over pairs of u_i · u_j, over an impression's categories."""
    rng, total = torch.Generator().manual_seed(0), sum(FIELDS)
    single = SINGLE * torch.randn(total, generator=rng)
    factors = PAIR * torch.randn(total, FACTORS, generator=rng)
    ids = _impressions(size + HELD_OUT, rng)
    u = factors[ids]
    pairs = (u.sum(1).square() - u.square().sum(1)).sum(1) / 2
    logits = BIAS + single[ids].sum(1) + pairs
    clicked = (torch.rand(len(ids), generator=rng) < logits.sigmoid()).long()
    train, test = (Log(*(t[part] for t in (ids, clicked, logits))) for part in (slice(size), slice(size, None)))
    return Clicks(train, test)


def _impressions(count: int, rng: torch.Generator) -> Int[Tensor, "k f"]:
    """Categories, drawn field by field."""
    made: list[Tensor] = []
    for size, first in zip(FIELDS, np.cumsum((0, *FIELDS)), strict=False):
        share = torch.arange(1, size + 1, dtype=torch.float64).pow(-POWER).cumsum(0)
        drawn = torch.rand(count, generator=rng, dtype=torch.float64) * share[-1]
        made.append(torch.searchsorted(share, drawn).clamp(max=size - 1) + int(first))
    return torch.stack(made, 1)


class Ctr(Recipe):
    """CrossNetwork (DCN-V2) on a generated click log; the logistic model that clicks were drawn from is what it could at best become."""

    name = "ref-ctr"
    about = (
        f"A small click-through model of weft's own, CrossNetwork (DCN-V2), trained on {LOG:,} generated impressions of {len(FIELDS)} "
        f"fields with {FIELDS[0]} to {FIELDS[-1]:,} categories, drawn by a power law. "
        "Clicks follow planted weights of categories and of pairs."
    )
    steps = 4000
    rate = 2e-3
    metric = "bits per impression"
    limit = 0.48
    net = CrossNetwork

    def model(self) -> nn.Module:
        """Embeddings of width 16, three cross layers of width 128, and two deep ones beside them."""
        return CrossNetwork(CrossNetworkConfig(vocab_size=sum(FIELDS), num_fields=len(FIELDS)))

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Cross-entropy of clicks."""
        held = clicks().train
        at = pick(rng, BATCH, len(held.ids))
        return nn.functional.cross_entropy(model(input_ids=held.ids[at]).logits, held.clicks[at])

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """4,096 training impressions."""
        ids = clicks().train.ids
        at = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:4096]
        return [{"input_ids": x} for x in ids[at].split(512)]

    def score(self, model: nn.Module) -> Scores:
        """Bits of each held-out impression's click, or of there being none."""
        held = clicks().test
        return bits(self._logits(model), held.clicks), np.ones(len(held.clicks))

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """The area under the ROC curve; both numbers of the planted model, which are the best possible; what the click rate alone costs."""
        held, made = clicks().test, self._logits(model)
        rate = float(clicks().train.clicks.double().mean())
        known = torch.stack([torch.zeros_like(held.logits), held.logits], 1)
        alone = torch.tensor([[1 - rate, rate]]).log().expand(len(held.clicks), 2)
        return {
            "AUC": auc(made[:, 1] - made[:, 0], held.clicks),
            "AUC of the planted model": auc(held.logits, held.clicks),
            "bits per impression of the planted model": float(bits(known, held.clicks).mean()),
            "bits per impression of the click rate alone": float(bits(alone, held.clicks).mean()),
            "click rate": rate,
        }

    def _logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, [{"input_ids": x} for x in clicks().test.ids.split(2000)])


def auc(scores: Float[Tensor, "k"], labels: Int[Tensor, "k"]) -> float:
    """The area under the ROC curve: how often what was clicked has a higher score than what was not, ties counting half."""
    from scipy.stats import rankdata

    ranks, hit = torch.from_numpy(rankdata(scores.double().numpy())), labels.bool()
    ones, others = int(hit.sum()), int((~hit).sum())
    return (float(ranks[hit].sum()) - ones * (ones + 1) / 2) / (ones * others) if ones and others else math.nan


RECIPE = Ctr()
