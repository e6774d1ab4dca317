"""What a model's output is compared by: KL of its distributions, the angle between its embeddings, or the squares of a field's errors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """How far a model's output is from the original's, a unit (token, text or image) at a time.

    For distributions over classes: KL(original || model) in nats. For embeddings: 1 - cosine of the mean-pooled vectors.
    For fields, what a denoiser gives: half the squared distance, the KL in nats of Gaussians of unit variance around them.
    Near the original all are quadratic, 1/2 δᵀ F δ; `probe` gives a loss whose gradients have second moment F.
    """

    kind: Literal["classes", "embedding", "field"]

    @property
    def embeds(self) -> bool:
        """Whether the output is an embedding."""
        return self.kind == "embedding"

    @property
    def name(self) -> str:
        """What is measured."""
        return {
            "classes": "KL to the original",
            "embedding": "1 - cosine to the original",
            "field": "half the squared distance to the original",
        }[self.kind]

    @property
    def unit(self) -> str:
        """Its unit."""
        return {"classes": "nats/token", "embedding": "per text", "field": "nats/image"}[self.kind]

    def vectors(self, out: Float[Tensor, "b ..."], batch: Batch) -> Float[Tensor, "u c"]:
        """One row a unit: the logits of every kept position, each text's normalised embedding, or each image's field."""
        if self.kind == "field":
            return out.flatten(1)
        held = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        mask = held.bool() if held is not None else None
        if self.embeds:
            return F.normalize(pool(out, mask), dim=-1)
        if out.dim() == 2:
            return out
        return out[mask] if mask is not None else out.flatten(0, 1)

    def probe(self, vectors: Float[Tensor, "u c"], rng: torch.Generator) -> Float[Tensor, ""]:
        """A random loss, summed over units, whose gradient g has E[g gᵀ] = F: labels drawn from the model, or a random direction."""
        if self.kind != "classes":
            return (vectors * torch.randn(vectors.shape, generator=rng).to(vectors)).sum()
        with torch.no_grad():
            logits = vectors.float()
            noise = torch.rand(logits.shape, generator=rng).clamp_(1e-10, 1 - 1e-7).to(logits.device)
            labels = (logits - (-noise.log_()).log_()).argmax(-1)
        return F.cross_entropy(vectors.float(), labels, reduction="sum")

    def distance(self, vectors: Float[Tensor, "u c"], original: Float[Tensor, "u c"]) -> Float[Tensor, "u"]:
        """The distance of each unit."""
        if self.kind == "field":
            return (vectors - original).float().square().sum(-1) / 2
        if self.embeds:
            return 1 - (vectors * original).sum(-1)
        p, q = F.log_softmax(original.float(), -1), F.log_softmax(vectors.float(), -1)
        return (p.exp() * (p - q)).sum(-1)


def pool(hidden: Float[Tensor, "b t d"], mask: Tensor | None) -> Float[Tensor, "b d"]:
    """Mean over the kept positions."""
    if mask is None:
        return hidden.mean(1)
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def objective(model: nn.Module) -> Objective:
    """The objective that fits the model: fields where it is told a time, embeddings where it has no head, else distributions."""
    if "timestep" in inspect.signature(type(model).forward).parameters:
        return Objective("field")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    classifier = any(hasattr(model, n) for n in ("classifier", "score"))
    return Objective("embedding" if head is None and not classifier else "classes")
