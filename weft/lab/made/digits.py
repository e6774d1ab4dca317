"""Handwritten digits that scikit-learn brings along: 1,797 images of 8 by 8 pixels, 400 of them held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.error import ResourceError

HELD_OUT = 400
PROCESSOR = (
    json.dumps(
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": False,
            "size": {"height": 8, "width": 8},
            "do_rescale": True,
            "rescale_factor": 1 / 16,
            "do_normalize": True,
            "image_mean": [0.5],
            "image_std": [0.5],
        },
        indent=1,
    )
    + "\n"
)
"""preprocessor_config.json: how grey values from 0 to 16 become a model's inputs."""


@dataclass(frozen=True)
class Images:
    """Images, -1 (paper) to 1 (ink), and which digit each shows."""

    images: Float[Tensor, "k 1 8 8"]
    labels: Int[Tensor, " k"]


@dataclass(frozen=True)
class Digits:
    """Disjoint sets, the same ones always."""

    train: Images
    test: Images


@cache
def digits() -> Digits:
    """The images, split. Errors: ResourceError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        what, got, fix = "a lab model's data are not installed", "no scikit-learn", 'pip install "weft[lab]"'
        raise ResourceError(what, where="digits", got=got, want="scikit-learn's digits", fix=fix) from e
    held: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(held.target))
    images = torch.tensor(held.images[order] / 8 - 1, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(held.target[order], dtype=torch.long)
    return Digits(
        train=Images(images[HELD_OUT:], labels[HELD_OUT:]),
        test=Images(images[:HELD_OUT], labels[:HELD_OUT]),
    )


def moved(images: Float[Tensor, "k 1 8 8"], rng: torch.Generator) -> Float[Tensor, "k 1 8 8"]:
    """The images, each moved by up to a pixel each way; paper comes in."""
    wide = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = torch.randint(3, (2, len(images)), generator=rng)
    return wide.unfold(2, 8, 1).unfold(3, 8, 1)[torch.arange(len(images)), :, down, right]
