"""ref-diffusion: a diffusion transformer that draws handwritten digits of 8 by 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.lab.made.digits import PROCESSOR, Images, digits
from weft.lab.made.recipe import Recipe, pick
from weft.lab.metrics import Scores
from weft.nets import FlowOutput, FlowTransformer, FlowTransformerConfig

BATCH = 64
DRAWS = 8
"""Times and noises that each held-out image is scored with."""
EACH, STEPS = 20, 25
"""Digits of a class that are drawn for the card, and Euler's steps of each."""


class Diffusion(Recipe):
    """FlowTransformer on scikit-learn's digits, told which digit it is: a rectified flow (Liu et al. 2022)."""

    name = "ref-diffusion"
    about = (
        "A small diffusion transformer of weft's own, FlowTransformer, for scikit-learn's handwritten digits (8 by 8 pixels, ten "
        "classes): given (1 - t) x + t e, t and the class of the image x, it estimates e - x."
    )
    steps = 2500
    rate = 2e-3
    metric = "squared error of the velocity per pixel"
    limit = 0.43
    net = FlowTransformer

    def model(self) -> nn.Module:
        """Four blocks of width 64 over sixteen patches."""
        return FlowTransformer(FlowTransformerConfig())

    def loss(self, model: Any, rng: torch.Generator) -> Tensor:
        """The squared error at uniform times."""
        held = digits().train
        at = pick(rng, BATCH, len(held.labels))
        images = held.images[at]
        time, noise = torch.rand(BATCH, generator=rng), torch.randn(images.shape, generator=rng)
        return errors(model, Images(images, held.labels[at]), time, noise).mean()

    def batches(self, seed: int = 0) -> list[dict[str, Tensor]]:
        """512 training images, each with noise at a time of its own."""
        held, rng = digits().train, torch.Generator().manual_seed(seed)
        made: list[dict[str, Tensor]] = []
        for at in torch.randperm(len(held.labels), generator=rng)[:512].split(64):
            time, noise = torch.rand(len(at), generator=rng), torch.randn(held.images[at].shape, generator=rng)
            noisy = between(held.images[at], noise, time)
            made.append({"pixel_values": noisy, "timestep": time, "class_labels": held.labels[at]})
        return made

    def score(self, model: nn.Module) -> Scores:
        """Of each held-out image, the mean over `DRAWS` times, one in each equal part of 0 to 1, and noises, the same always."""
        held, rng = digits().test, torch.Generator().manual_seed(0)
        total = torch.zeros(len(held.labels), dtype=torch.float64)
        for k in range(DRAWS):
            time = (k + torch.rand(len(total), generator=rng)) / DRAWS
            noise = torch.randn(held.images.shape, generator=rng)
            with torch.no_grad():
                total += errors(model, held, time, noise).double()
        return (total / DRAWS).numpy(), np.ones(len(total))

    def facts(self, model: nn.Module) -> Mapping[str, float]:
        """What the best linear estimate scores; how often a classifier reads what was asked for in generated digits, and how they vary."""
        held = digits()
        labels = torch.arange(10).repeat_interleave(EACH)
        made = Images(generate(model, labels, seed=0), labels)
        return {
            "squared error of the best linear estimate of each class": float(self.score(Linear(held.train))[0].mean()),
            "generated digits that a classifier reads as asked": read(made),
            "held-out digits that it reads rightly": read(held.test),
            "variance of generated digits of a class over that of held-out ones": spread(made) / spread(held.test),
        }

    def files(self) -> Mapping[str, str]:
        """How an image of 8 by 8 grey values from 0 to 16 becomes an input."""
        return {"preprocessor_config.json": PROCESSOR}


def between(
    x: Float[Tensor, "b c h w"], e: Float[Tensor, "b c h w"], t: Float[Tensor, "b"]
) -> Float[Tensor, "b c h w"]:
    """(1 - t) x + t e."""
    return x + t.view(-1, 1, 1, 1) * (e - x)


def errors(model: Any, of: Images, time: Float[Tensor, "b"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b"]:
    """Each image's mean squared error of the velocity e - x at these times with this noise."""
    seen = between(of.images, noise, time)
    made = model(pixel_values=seen, timestep=time, class_labels=of.labels).sample
    return (made - (noise - of.images)).square().flatten(1).mean(1)


class Linear(nn.Module):
    """The best estimate of the velocity that is linear in the noisy image, for each class: as if its images were Gaussian.

    With mean m and covariance C: (t I - (1 - t) C) ((1 - t)² C + t² I)⁻¹ (x_t - (1 - t) m) - m.
    """

    def __init__(self, of: Images) -> None:
        super().__init__()
        classes = [of.images[of.labels == d].flatten(1) for d in range(10)]
        self.means = torch.stack([x.mean(0) for x in classes])
        values, self.turns = torch.linalg.eigh(torch.stack([torch.cov(x.T) for x in classes]))
        self.values = values.clamp(min=0) + 1e-3

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], timestep: Float[Tensor, "b"], class_labels: Int[Tensor, "b"]
    ) -> Any:
        """The velocity, as `FlowTransformer` gives it."""
        mean, turn, c, t = (
            self.means[class_labels],
            self.turns[class_labels],
            self.values[class_labels],
            timestep[:, None],
        )
        gap = torch.einsum("bij,bi->bj", turn, pixel_values.flatten(1) - (1 - t) * mean)
        made = torch.einsum("bij,bj->bi", turn, gap * (t - (1 - t) * c) / ((1 - t).square() * c + t * t)) - mean
        return FlowOutput(sample=made.view_as(pixel_values))


def generate(model: Any, labels: Int[Tensor, "b"], *, seed: int, steps: int = STEPS) -> Float[Tensor, "b c h w"]:
    """An image of each label, from noise: Euler's steps from t = 1 to 0."""
    size = model.config.image_size
    x = torch.randn(len(labels), model.config.num_channels, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for k in range(steps, 0, -1):
            time = torch.full((len(labels),), k / steps)
            x = x - model(pixel_values=x, timestep=time, class_labels=labels).sample / steps
    return x


def read(of: Images) -> float:
    """The share of images that a support vector machine, trained on the training images, reads as labelled."""
    from sklearn.svm import SVC

    held = digits().train
    machine = SVC().fit(held.images.flatten(1).numpy(), held.labels.numpy())
    return float((machine.predict(of.images.flatten(1).numpy()) == of.labels.numpy()).mean())


def spread(of: Images) -> float:
    """The mean variance of a pixel within a class."""
    return float(torch.stack([of.images[of.labels == d].var(0).mean() for d in range(10)]).mean())


RECIPE = Diffusion()
