"""ref-vit: a vision transformer that reads handwritten digits of 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.lab.made.digits import PROCESSOR, digits, moved
from weft.lab.made.recipe import Recipe, bits, logits_of, pick
from weft.lab.metrics import Scores

BATCH = 64


class Vit(Recipe):
    """ViTForImageClassification on scikit-learn's digits, moved by up to a pixel in training."""

    name = "ref-vit"
    about = "A small ViTForImageClassification for scikit-learn's handwritten digits (8 by 8 pixels, ten classes)."
    steps = 1500
    rate = 2e-3
    metric = "bits per image"
    limit = 1.0

    def model(self) -> nn.Module:
        """Three blocks of width 64 over sixteen patches."""
        from transformers import ViTConfig, ViTForImageClassification

        labels = {i: str(i) for i in range(10)}
        return ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=128, initializer_range=0.1, id2label=labels, label2id={v: k for k, v in labels.items()},
            )
        )  # fmt: skip

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Cross-entropy of a batch of moved images."""
        held = digits().train
        at = pick(rng, BATCH, len(held.labels))
        return nn.functional.cross_entropy(model(pixel_values=moved(held.images[at], rng)).logits, held.labels[at])

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """512 training images."""
        images = digits().train.images
        at = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:512]
        return [{"pixel_values": x} for x in images[at].split(BATCH)]

    def score(self, model: nn.Module) -> Scores:
        """Bits of each held-out image's label."""
        held = digits().test
        return bits(self._logits(model), held.labels), np.ones(len(held.labels))

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """Accuracy."""
        return {"accuracy": float((self._logits(model).argmax(1) == digits().test.labels).double().mean())}

    def files(self) -> Mapping[str, str]:
        """How an image of 8 by 8 grey values from 0 to 16 becomes an input."""
        return {"preprocessor_config.json": PROCESSOR}

    def _logits(self, model: nn.Module) -> Tensor:
        return logits_of(model, [{"pixel_values": x} for x in digits().test.images.split(BATCH)])


RECIPE = Vit()
