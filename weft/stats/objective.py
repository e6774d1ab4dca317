"""What a model's output is compared by: KL of its distributions, or the angle between its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """How far a model's output is from the original's, a unit (token or text) at a time.

    For distributions over classes: KL(original || model) in nats. For embeddings: 1 - cosine of the mean-pooled vectors.
    Near the original both are quadratic, 1/2 δᵀ F δ; `probe` gives a loss whose gradients have second moment F.
    """

    embeds: bool

    @property
    def name(self) -> str:
        """What is measured."""
        return "1 - cosine to the original" if self.embeds else "KL to the original"

    @property
    def unit(self) -> str:
        """Its unit."""
        return "per text" if self.embeds else "nats/token"

    def vectors(self, out: Float[Tensor, "b t c"], batch: Batch) -> Float[Tensor, "u c"]:
        """One row a unit: the logits of every kept position, or each text's normalised embedding."""
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        if self.embeds:
            return F.normalize(pool(out, mask), dim=-1)
        if out.dim() == 2:
            return out
        return out[mask] if mask is not None else out.flatten(0, 1)

    def probe(self, vectors: Float[Tensor, "u c"], rng: torch.Generator) -> Float[Tensor, ""]:
        """A random loss, summed over units, whose gradient g has E[g gᵀ] = F: labels drawn from the model, or a random direction."""
        if self.embeds:
            return (vectors * torch.randn(vectors.shape, generator=rng).to(vectors)).sum()
        with torch.no_grad():
            logits = vectors.float()
            noise = torch.rand(logits.shape, generator=rng).clamp_(1e-10, 1 - 1e-7).to(logits.device)
            labels = (logits - (-noise.log_()).log_()).argmax(-1)
        return F.cross_entropy(vectors.float(), labels, reduction="sum")

    def distance(self, vectors: Float[Tensor, "u c"], original: Float[Tensor, "u c"]) -> Float[Tensor, "u"]:
        """The distance of each unit."""
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
    """The objective that fits the model: embeddings where it has no head, else distributions."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    classifier = any(hasattr(model, n) for n in ("classifier", "score"))
    return Objective(embeds=head is None and not classifier)
