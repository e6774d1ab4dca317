"""The arms of a claim on reading: long texts, read through a window, with and without learning from what was read."""

from __future__ import annotations

import math

import numpy as np
import torch

from weft.engine.run import Chain, apply, chain_key
from weft.lab import metrics
from weft.lab.trial import Arm, Trial, task_of, texts
from weft.learn.reader import Reader
from weft.learn.settings import Reading
from weft.model import fork

DOCUMENTS = 6
LENGTH = 1024
"""Tokens of a document that are read; shorter ones are not."""
HOW = Reading(chunk=128, window=128, epochs=2, lr=2e-3)


def read(trial: Trial, chain: Chain, learns: bool) -> Arm:
    """Bits a byte of each document, a chunk after the other; what the chain made trainable learns them, or stays as it is."""
    words = trial.subject.tokenizer
    long = [
        ids for t in texts(task_of(trial.subject.tuning_task, 0).train) if len(ids := words(t)["input_ids"]) >= LENGTH
    ]
    mine = np.roll(np.arange(len(long)), -trial.seed * DOCUMENTS)[:DOCUMENTS]
    held = [torch.tensor(long[i][:LENGTH]) for i in mine]
    how = HOW if learns else HOW.model_copy(update={"epochs": 0})

    def make() -> metrics.Scores:
        size = np.array([len(words.decode(ids).encode()) for ids in held], dtype=np.float64)
        bits = [float(_reader(trial, chain, how).read(ids).sum()) / math.log(2) for ids in held]
        return np.array(bits) / size, size

    what = [chain_key(chain), how.model_dump(), [ids.tolist() for ids in held]]
    return trial.arm("read", what, make, ("bits per byte of a long text", "bits/byte"))


def _reader(trial: Trial, chain: Chain, how: Reading) -> Reader:
    model = fork(trial.subject.model)
    apply(model, chain, at="all-linear", seed=trial.seed)
    return Reader(model, how, start=trial.subject.tokenizer.eos_token_id)
