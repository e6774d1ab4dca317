"""Objectives in two processes, as torchrun starts them: the losses of one, and the same trained tensors in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import WORDS, build_tiny, tokenizer
from torch import Tensor

from weft.engine import objectives
from weft.engine.run import Step, apply
from weft.learn.data import Example, Pair, Response
from weft.learn.train import train
from weft.learn.trainer import trainable
from weft.model import weave

from .processes import launched

SAID: list[Example] = [
    Response(" ".join(WORDS[: 2 + i % 3]), " ".join(WORDS[(i * j) % 20] for j in range(1 + i)), reference=WORDS[i])
    for i in range(9)
]
PAIRS: list[Example] = [Pair(f"question {WORDS[i]}", f"answer {WORDS[i]} {WORDS[i + 1]}") for i in range(9)]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "distill": ("llama", "rtn", {"labels": 0.5}),
    "align": ("llama", "rtn", {}),
    "pairs": ("bert", "rtn", {"labels": 0.5}),
    "relax": ("llama", "lsq", {}),
}


def learnt(case: str, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained tensors of five steps, stopped after four of them and started again."""
    family, base, options = CASES[case]
    off = {} if family == "llama" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    aim = objectives.named("align" if case == "align" else "distill", **options)
    data = SAID if family == "llama" else PAIRS
    more: dict[str, Any] = {"micro_batch": 1} if family == "llama" else {}
    for steps in (4, 5):
        model = weave(build_tiny(family, **off))
        apply(model, [Step.of(base, bits=3)], at="all-linear")
        apply(model, [Step.of("lora", rank=4)], at="all-linear")
        how: dict[str, Any] = {"batch": 4, "lr": 1e-3, "save_every": 2, "schedule": "constant", "warmup": 0.0, **more}
        said = train(model, data, tokenizer=tokenizer(), steps=steps, out=folder / case, objective=aim, **how)
    return [loss for _, loss in said.losses], {n: t.detach().clone() for n, t in trainable(model).items()}


def _work(rank: int, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for case in CASES:
        losses, tensors = learnt(case, folder)
        made |= {f"{case} losses": torch.tensor(losses), case: tensors}
    return made


def test_two_processes_lower_what_one_does(tmp_path: Path) -> None:
    """Targets of other numbers in each, pairs whose contrast spans both, and weights that train through rounding; stopped and resumed."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    a, b = launched(_work, tmp_path / "two")
    for case in CASES:
        losses, _ = learnt(case, tmp_path / "one")
        assert np.allclose(losses, a[f"{case} losses"], rtol=1e-4 if case == "relax" else 1e-5), case
        assert all(torch.equal(a[case][n], b[case][n]) for n in a[case] | b[case])
