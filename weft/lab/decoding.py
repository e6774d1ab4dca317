"""The decoded arms of a claim: how many tokens of a continuation another way of decoding changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from weft.lab import metrics
from weft.lab.trial import Arm, Trial

PROMPTS = 12
LENGTH, NEW = 96, 32
"""Tokens of a prompt, and of what is written after it."""


def changed(trial: Trial, how: Mapping[str, Any]) -> Arm:
    """The share of each continuation's tokens that differ from greedy decoding's when `generate` is told `how`."""

    def make() -> metrics.Scores:
        rows = torch.cat([b["input_ids"] for b in trial.held_out])[:PROMPTS, :LENGTH]
        torch.manual_seed(trial.seed)
        shares = [float((_written(trial, r, how) != _written(trial, r, {})).float().mean()) for r in rows]
        return np.array(shares), np.ones(len(shares))

    what = [trial.data, PROMPTS, LENGTH, NEW, sorted(how.items())]
    return trial.arm("decoded", what, make, ("share of tokens that differ from greedy decoding's", "of 1"))


def _written(trial: Trial, prompt: torch.Tensor, how: Mapping[str, Any]) -> torch.Tensor:
    """Exactly `NEW` tokens after the prompt; after an early end, padding."""
    with torch.no_grad():
        given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **how}
        ids = cast(Any, trial.subject.model).generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], **given
        )
    return torch.nn.functional.pad(ids[0, len(prompt) :], (0, NEW), value=-1)[:NEW]
