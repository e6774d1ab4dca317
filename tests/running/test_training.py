"""`weft.train` in two processes, as torchrun starts them: the losses of one, and the same trained tensors in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, build_tiny, tokenizer
from torch import Tensor

from weft.engine import optimizers
from weft.engine.run import Step, apply
from weft.error import OptionError
from weft.learn.data import Pair, Text
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import weave

from .processes import launched

TEXTS = [Text(" ".join(WORDS[(i * j) % 20] for j in range(3 + i))) for i in range(9)]
PAIRS = [Pair(f"question {WORDS[i]}", f"answer {WORDS[i]} {WORDS[i + 1]}") for i in range(9)]
CASES = ("llama", "bert", "mezo")
HELD = [Text("the old bird flew over the hill")]


def learnt(case: str, rank: int, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained tensors of five steps, by gradients or by losses alone, stopped after four of them and started again."""
    family, by_losses = ("llama", True) if case == "mezo" else (case, False)
    off = {} if family == "llama" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    data = TEXTS if family == "llama" else PAIRS
    more: dict[str, Any] = {"micro_batch": 1, "held_out": HELD} if family == "llama" else {}
    for steps in (4, 5):
        model = weave(build_tiny(family, **off))
        apply(model, [Step.of("rtn"), Step.of("lora", rank=4)], at="all-linear")
        more["optimizer"] = optimizers.named("mezo") if by_losses else None
        options = {"batch": 4, "lr": 1e-2, "save_every": 2, "schedule": "constant", "warmup": 0.0, **more}
        said = train(model, data, tokenizer=tokenizer(), steps=steps, out=folder / case, **options)
    return [loss for _, loss in said.losses], {n: t.detach().clone() for n, t in trainable(model).items()}


def _work(rank: int, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for family in CASES:
        losses, tensors = learnt(family, rank, folder)
        made |= {f"{family} losses": torch.tensor(losses), family: tensors}
    for bad in ({"batch": 3}, {"batch": 4, "held_out": HELD}):
        with pytest.raises(OptionError):
            train(weave_one(), TEXTS, tokenizer=tokenizer(), steps=1, **bad)
    return made


def weave_one() -> Any:
    """A tiny model with an adapter."""
    model = weave(build_tiny("llama"))
    apply(model, [Step.of("lora", rank=1)], at="all-linear")
    return model


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Texts in micro-batches with held-out scores, and pairs, whose contrast spans both processes; stopped and resumed."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    a, b = launched(_work, tmp_path / "two")
    for family in CASES:
        losses, _ = learnt(family, 0, tmp_path / "one")
        assert np.allclose(losses, a[f"{family} losses"], rtol=1e-5)
        assert all(torch.equal(a[family][n], b[family][n]) for n in a[family] | b[family])
