"""Full fine-tuning of the upper blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Outline, Planned, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="recipe", rows="P036", paper="2304.05216", uses=("full",))
def telly(
    model: Outline,
    *,
    freeze: Annotated[
        float, Field(ge=0, le=1, description="share of the blocks, from below, that stay as they are")
    ] = 0.5,
) -> list[Planned]:
    """Tune everything above the lower blocks, weights and vectors; these and what stands before them, such as embeddings, are frozen.

    The number of frozen blocks, K in the paper, is rounded to the nearest. A head that is tied to the embeddings is frozen with them.
    """
    below = round(freeze * model.blocks)
    return [model.step("full", [n for n, depth in model.sites.items() if depth > below])]


@telly.claim("with half of the blocks frozen gains at least 90 % of what tuning all of them gains")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("telly", {})], baseline=[("full", {})], share=0.9)
