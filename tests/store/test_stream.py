"""Streams of tensors: one is in memory at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import torch

from weft.store.tensors import Later, read_tensors, stream


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def make() -> torch.Tensor:
        assert all(held() is None for held in made)
        value = np.full((4, 4), float(len(made)), np.float32)
        made.append(weakref.ref(value))
        return torch.from_numpy(value)

    stream(tmp_path / "x.safetensors", {name: Later(torch.float32, (4, 4), make) for name in "abc"})
    assert [float(t[0, 0]) for t in read_tensors(tmp_path / "x.safetensors").values()] == [0, 1, 2]
