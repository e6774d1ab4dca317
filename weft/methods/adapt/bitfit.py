"""Biases alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.engine import Group, method
from weft.expr import Expr, unfrozen

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2106.10199", on=("bias",))
def bitfit(g: Group) -> Expr:
    """Make every bias trainable, those of norms too, and nothing else: y = W x + b, W as it is.

    A model without biases is refused: to add them would make it a model of another architecture.
    """
    return unfrozen(g.now)


@bitfit.claim("with 0.1 % of the parameters reaches at least 80 % of what full fine-tuning gains on a shifted domain")
def claim(lab: Lab) -> Claim:
    return lab.only("minilm").tune(ours=[("bitfit", {})], baseline=[("full", {})], share=0.8)
