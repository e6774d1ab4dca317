"""Learn the outputs of another model, or of the model before it was compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.learn.aim import Compared

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="objective", paper="1503.02531")
def distill(
    seen: Compared,
    *,
    temperature: Annotated[float, Field(ge=0.1, le=100, description="by which logits of both are divided")] = 1.0,
    labels: Annotated[float, Field(ge=0, le=1, description="share of the labels' own loss")] = 0.0,
) -> Float[Tensor, "u"]:
    """(1 - labels) T² KL(softmax(ref / T) || softmax(out / T)) + labels · -log p(target), of each target.

    The reference is the teacher, or, where none is given, the pretrained weights of the model that trains. Of embeddings the distance is
    1 - cosine, and the labels' loss the contrast of pairs.
    """
    distance = seen.distance(temperature)
    return (1 - labels) * distance + labels * seen.labels() if labels else distance


@distill.claim(
    "an adapter of a 3-bit model that learns the original's outputs ends nearer to it than one that learns labels"
)
def claim(lab: Lab) -> Claim:
    rounded = [("rtn", {"bits": 3}), ("lora", {"rank": 16})]
    return lab.restore(ours=[*rounded, ("distill", {})], baseline=rounded)
