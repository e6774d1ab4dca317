"""Full fine-tuning of one kind of part in a range of blocks, softly masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from weft.engine import Outline, Planned, method

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="recipe", rows="P026", paper="2404.10306", uses=("full", "soft"))
def cofitune(
    model: Outline,
    *,
    above: Annotated[float, Field(ge=0, le=1, description="share of the blocks below the range")] = 0.25,
    upto: Annotated[float, Field(ge=0, le=1, description="share of the blocks that the range ends with")] = 0.5,
    part: Annotated[Literal["ffn", "attention", "both"], Field(description="the parts of these blocks")] = "ffn",
    mask: Annotated[bool, Field(description="move rows less that matter to the calibration data (soft)")] = True,
) -> list[Planned]:
    """Tune the weights of the feed-forward parts, or of attention, in one range of blocks; all else is frozen.

    The default is where the paper's search over ranges and parts ends, which keeps most of the general ability; the range has at
    least one block. Its search is not repeated: try ranges with `above`, `upto` and `part`. The mask's data stand for the general ability.
    """
    start = min(round(above * model.blocks), model.blocks - 1)
    end = max(round(upto * model.blocks), start + 1)
    wanted = model.fed(feed=True) if part != "attention" else set[str]()
    wanted |= model.fed(feed=False) if part != "ffn" else set[str]()
    chosen = [n for n, depth in model.sites.items() if n in wanted and start < depth <= end]
    return [model.step("soft" if mask else "full", chosen)]


@cofitune.claim("of the second quarter's feed-forward parts gains more than of the second quarter's attention")
def claim(lab: Lab) -> Claim:
    ours, baseline = ({"part": part, "mask": False} for part in ("ffn", "attention"))
    return lab.tune(ours=[("cofitune", ours)], baseline=[("cofitune", baseline)], share=1.0)


@cofitune.claim("softly masked gains at least 90 % of what it gains without the mask", of="mask")
def mask(lab: Lab) -> Claim:
    ours, baseline = ({"mask": on} for on in (True, False))
    return lab.tune(ours=[("cofitune", ours)], baseline=[("cofitune", baseline)], share=0.9)
