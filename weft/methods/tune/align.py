"""Make a prompt in other words do what it does in reference words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weft.engine import method
from weft.learn.aim import Compared

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="objective", rows="P017", paper="2306.11270", needs={"reference"})
def align(
    seen: Compared,
    *,
    share: Annotated[float, Field(gt=0, le=1, description="of the distance; the rest is the labels' own loss")] = 0.5,
) -> Float[Tensor, "u"]:
    """share · KL(p(· | reference) || p(· | prompt)) + (1 - share) · -log p(target), of each target.

    Records have beside their `prompt` the same in reference words, `reference`; one without is its own. What trains is usually a soft
    prompt (`--method prompt`). Departure from the paper: the model that reads the reference has no soft prompt, so that what prompts are
    held to does not move, and cannot collapse.
    """
    return share * seen.distance() + (1 - share) * seen.labels()


@align.claim(
    "on wordings that were not trained on, a soft prompt that aligns them gains more than one that learns labels"
)
def claim(lab: Lab) -> Claim:
    prompt = ("prompt", {"length": 16})
    return lab.reword(ours=[prompt, ("align", {})], baseline=[prompt])
