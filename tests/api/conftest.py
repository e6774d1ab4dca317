"""Models that the API suites share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., nn.Module], words: Any) -> Callable[..., Path]:
    """Writes a tiny checkpoint with its tokenizer: `folder("llama-tied")`."""

    def make(family: str = "llama-tied", dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Path:
        place = tmp_path / f"source-{family}"
        shutil.rmtree(place, ignore_errors=True)
        tiny(family, dtype=dtype, **changed).save_pretrained(place)
        words.save_pretrained(place)
        return place

    return make
