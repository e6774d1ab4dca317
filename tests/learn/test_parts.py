"""Adapters that train by parts: which part a step has is decided by its number and the seed, however the step is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from weft.learn.data import Text
from weft.learn.train import History, train
from weft.learn.trainer import trainable
from weft.model import weave

from .test_train import TEXTS, Until, result, same


def parted(tiny: Any) -> nn.Module:
    """A tiny model with an adapter of three parts in every block, moved from its start."""
    model = weave(tiny())
    weft.apply(model, "bottleneck", width=6, splits=3)
    with torch.no_grad():
        for p in trainable(model).values():
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def learnt(model: nn.Module, words: Any, **given: Any) -> History:
    """Six steps of four examples."""
    return train(model, TEXTS, tokenizer=words, **{"steps": 6, "batch": 4, "length": 32, "save_every": 2} | given)


def test_a_resumed_run_has_the_same_parts(tiny: Any, words: Any, tmp_path: Path) -> None:
    """Stopped and called again, it ends with the bits of the straight run; another seed draws other parts."""
    straight, stopped, again, other = (parted(tiny) for _ in range(4))
    learnt(straight, words, out=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        learnt(stopped, words, out=tmp_path / "b", progress=Until(5))
    learnt(again, words, out=tmp_path / "b")
    learnt(other, words, seed=1)
    assert same(result(again), result(straight)) and not same(result(other), result(straight))


@pytest.mark.parametrize("how", [{"micro_batch": 1}, {"checkpointing": True}])
def test_a_step_has_one_part_however_it_is_computed(how: dict[str, Any], tiny: Any, words: Any) -> None:
    """Micro-batches and blocks computed again change the losses by rounding alone."""
    one, many = parted(tiny), parted(tiny)
    whole, parts = learnt(one, words), learnt(many, words, **how)
    assert [x for _, x in parts.losses] == pytest.approx([x for _, x in whole.losses], rel=1e-5)


def test_the_model_ends_whole(tiny: Any, words: Any) -> None:
    """After training and in scores in between all parts take part: nothing is left of the last step."""
    model = parted(tiny)
    learnt(model, words, held_out=[Text("a bird flew over a hill .")], eval_every=2)
    ids = torch.arange(4, 12)[None]
    whole = parted(tiny)
    for a, b in zip(weft.model.branches(whole), weft.model.branches(model), strict=True):
        a.splits = 1
        a.down.data, a.up.data = b.down.data, b.up.data
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
