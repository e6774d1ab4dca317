"""Streams of tensors: one is in memory at a time."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.store.tensors import Later, finite, read_tensors, stream


def test_a_tensor_is_gone_before_the_next_is_made(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def make(_: torch.Tensor) -> torch.Tensor:
        assert all(held() is None for held in made)
        value = np.full((4, 4), float(len(made)), np.float32)
        made.append(weakref.ref(value))
        return torch.from_numpy(value)

    stream(tmp_path / "x.safetensors", {name: Later(torch.float32, (4, 4), make) for name in "abc"})
    assert [float(t[0, 0]) for t in read_tensors(tmp_path / "x.safetensors").values()] == [0, 1, 2]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("size", [1, 5, 300_000])
def test_what_is_not_finite_is_found(dtype: torch.dtype, size: int) -> None:
    """Wherever it stands, of either sign; the largest, the smallest and negative zero are finite."""
    some = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, -0.0, math.inf, -math.inf, math.nan, -math.nan]
    assert finite(some) and finite(some[:0])
    for value in values:
        for at in {0, size // 2, size - 1}:
            some_more = some.clone()
            some_more[at] = value
            assert finite(some_more) == bool(
                torch.isfinite(some_more.float() if dtype.itemsize == 1 else some_more).all()
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_told_right(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert [finite(x) for x in every.split(1)] == torch.isfinite(every).tolist()
