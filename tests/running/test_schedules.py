"""Schedules in two processes, as torchrun starts them: both choose the same, by the gradients of both, and go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import WORDS, build_tiny, tokenizer
from torch import Tensor, nn

from weft.engine import schedules
from weft.engine.run import Step, apply
from weft.learn.data import Text
from weft.learn.train import train
from weft.model import weave

from .processes import launched

TEXTS = [Text(" ".join(WORDS[(i * j) % 20] for j in range(3 + i))) for i in range(9)]
CASES: dict[str, dict[str, Any]] = {
    "spiel": {"every": 4, "over": 1},
    "id3": {"every": 3},
    "lt_sft": {"full": 0.5},
    "sara": {"turn": 0.5},
}
STEPS = 7


def learnt(case: str, folder: Path | None, micro: int) -> tuple[list[float], nn.Module]:
    """Losses of a run, and the model; with a folder one that was stopped, and started again."""
    for steps in (STEPS - 2, STEPS) if folder is not None else (STEPS,):
        model = weave(build_tiny())
        apply(model, [Step.of("rtn"), Step.of("sparse", rank=2)], at="all-linear")
        options: dict[str, Any] = {"batch": 4, "micro_batch": micro, "lr": 1e-2, "schedule": "constant", "warmup": 0.0}
        made = schedules.named(case, **CASES[case])
        during = (lambda _, made=made: made(STEPS)) if folder is not None else made  # the longer run's, from the start
        out = folder / case if folder is not None else None
        said = train(model, TEXTS, tokenizer=tokenizer(), steps=steps, during=during, out=out, save_every=1, **options)
    return [loss for _, loss in said.losses], model


def state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the model."""
    return {k: t.detach().clone() for k, t in model.state_dict().items()}


def _work(rank: int, folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for case in CASES:
        losses, model = learnt(case, None, 1)
        again, other = learnt(case, folder, 1)
        same = all(torch.equal(a, b) for a, b in zip(state(model).values(), state(other).values(), strict=True))
        made |= {f"{case} losses": torch.tensor(losses), f"{case} again": torch.tensor(again), case: state(model)}
        made[f"{case} same"] = same
    return made


def test_two_processes_choose_the_same(tmp_path: Path) -> None:
    """To the bit, stopped or not; what goes by no nominations as one process does, which computes the same sums."""
    a, b = launched(_work, tmp_path)
    for case in CASES:
        assert a[case].keys() == b[case].keys() and all(torch.equal(a[case][n], b[case][n]) for n in a[case])
        assert a[f"{case} same"] and b[f"{case} same"] and torch.equal(a[f"{case} losses"], a[f"{case} again"])
        losses, model = learnt(case, None, 2)
        first = weave(build_tiny())
        apply(first, [Step.of("rtn"), Step.of("sparse", rank=2)], at="all-linear")
        begun = [k for k in a[case] if k.endswith("columns") and "start" not in k]
        assert not any(torch.equal(a[case][k], state(first)[k]) for k in begun)  # they did choose
        exact = len(losses) if case in ("lt_sft", "sara") else 2
        assert np.allclose(losses[:exact], a[f"{case} losses"][:exact], rtol=1e-4)
        if case == "sara":
            assert all(
                torch.allclose(t.float(), a[case][n].float(), rtol=1e-2, atol=1e-4) for n, t in state(model).items()
            )
