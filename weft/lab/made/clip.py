"""ref-clip: images of digits and captions that name them, in one space."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weft.lab.made.digits import PROCESSOR, digits, moved
from weft.lab.made.recipe import Recipe, bits, pick
from weft.lab.made.words import tokenizer
from weft.lab.metrics import Scores

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of a {}", "the digit {}", "someone wrote a {} by hand", "this is {}", "{}", "a small grey {}")
BATCH = 64
LENGTH = 8
WIDTH: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.1,
}


class Clip(Recipe):
    """CLIPModel on digits; an image and a caption match where the caption names the digit."""

    name = "ref-clip"
    about = (
        "A small CLIPModel for scikit-learn's handwritten digits and captions that name them in one of "
        f"{len(TEMPLATES)} ways, such as 'a photo of a seven'."
    )
    steps = 700
    rate = 2e-3
    metric = "bits per image, among the captions of ten digits"
    limit = 1.0

    def model(self) -> nn.Module:
        """Three blocks of width 64 on each side."""
        from transformers import CLIPConfig, CLIPModel

        ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        return CLIPModel(
            CLIPConfig(
                text_config={"vocab_size": 32, "max_position_embeddings": LENGTH, **ends, **WIDTH},
                vision_config={"image_size": 8, "patch_size": 2, "num_channels": 1, **WIDTH},
                projection_dim=48,
            )
        )

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """Cross-entropy both ways, the weight shared by all of the batch that shows or names the same digit."""
        held = digits().train
        at, way = pick(rng, BATCH, len(held.labels)), pick(rng, BATCH, len(TEMPLATES))
        labels = held.labels[at]
        text = self._captions([(int(w), int(d)) for w, d in zip(way, labels, strict=True)])
        logits = model(pixel_values=moved(held.images[at], rng), **text).logits_per_image
        same = (labels[:, None] == labels[None]).float()
        target = same / same.sum(1, keepdim=True)
        return nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """512 training images and a caption of each."""
        held, rng = digits().train, torch.Generator().manual_seed(seed)
        made: list[dict[str, Tensor]] = []
        for at in torch.randperm(len(held.labels), generator=rng)[:512].split(BATCH):
            text = self._captions([(int(d) % len(TEMPLATES), int(d)) for d in held.labels[at]])
            made.append({"pixel_values": held.images[at], **text})
        return made

    def score(self, model: nn.Module) -> Scores:
        """Bits of the right caption among those of all digits, worded alike; the mean over wordings, for each held-out image."""
        logits, labels = self._logits(model), digits().test.labels
        return np.mean([bits(part, labels) for part in logits], 0), np.ones(len(labels))

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """How often the right caption is the nearest."""
        right = self._logits(model).argmax(-1) == digits().test.labels
        return {"retrieval of the right caption": float(right.double().mean())}

    def words(self) -> Any:
        """One token a word."""
        return self._words

    def files(self) -> Mapping[str, str]:
        """How images become inputs."""
        return {"preprocessor_config.json": PROCESSOR}

    @cached_property
    def _words(self) -> Any:
        said = dict.fromkeys(w for t in TEMPLATES for w in t.replace("{}", "").split())
        return tokenizer([*said, *NUMBERS], length=LENGTH)

    def _captions(self, which: list[tuple[int, int]]) -> dict[str, Tensor]:
        texts = [TEMPLATES[w].format(NUMBERS[d]) for w, d in which]
        return dict(self._words(texts, padding=True, return_tensors="pt", return_token_type_ids=False))

    def _logits(self, model: Any) -> Tensor:
        """Logits [w k c] of each wording's ten captions for each held-out image."""
        texts = self._captions([(w, d) for w in range(len(TEMPLATES)) for d in range(10)])
        with torch.no_grad():
            parts = [model(pixel_values=x, **texts).logits_per_image for x in digits().test.images.split(100)]
        return torch.cat(parts).view(-1, len(TEMPLATES), 10).transpose(0, 1)


RECIPE = Clip()
