"""Full fine-tuning made stable: frozen lower blocks, rates that fall towards the input, upper blocks that start anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from weft.engine import Outline, Planned, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="recipe", rows="P137", paper="2112.07869", uses=("full", "fresh", "layerwise"))
def stability(
    model: Outline,
    *,
    freeze: Annotated[
        float, Field(ge=0, le=1, description="share of the blocks, from below, that stay as they are")
    ] = 0.0,
    decay: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="rate of a block over that of the one above; what is behind the blocks has the full one",
        ),
    ] = 0.9,
    fresh: Annotated[int, Field(ge=0, le=128, description="blocks, from above, that start anew")] = 0,
) -> list[Planned]:
    """Tune everything, or what is above the frozen blocks, with AdamW at a rate that falls by `decay` a block from the output down.

    With `freeze` what stands before the blocks is frozen too. The paper freezes in small models, decays in large ones, and starts the
    upper blocks anew for tasks of similarity.
    """
    below, deepest = round(freeze * model.blocks) if freeze else -1, model.blocks
    if fresh > deepest:
        model.fallback(f"all {deepest} blocks start anew, for there are no {fresh}")
    again = [n for n, depth in model.sites.items() if deepest - fresh < depth <= deepest]
    steps = [model.step("fresh", again)] if fresh else []
    rest = [n for n, depth in model.sites.items() if depth > below and n not in set(again if fresh else ())]
    return [*steps, *([model.step("full", rest)] if rest else []), model.step("layerwise", decay=decay)]


@stability.claim("with rates that fall by 0.9 a block gains more than with one rate")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("stability", {})], baseline=[("full", {})], share=1.0)


@stability.claim("with the lower half frozen gains more than with all of it tuned", of="freeze")
def freeze(lab: Lab) -> Claim:
    ours, baseline = ({"freeze": share, "decay": 1.0} for share in (0.5, 0.0))
    return lab.tune(ours=[("stability", ours)], baseline=[("stability", baseline)], share=1.0)


@stability.claim("with a last block that starts anew gains more", of="fresh")
def fresh(lab: Lab) -> Claim:
    ours, baseline = ({"fresh": blocks, "decay": 1.0} for blocks in (1, 0))
    return lab.tune(ours=[("stability", ours)], baseline=[("stability", baseline)], share=1.0)
