"""Full fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.engine import Group, method
from weft.expr import Dense, Expr, unfrozen

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", on=("matrix", "vector"), drops=("zeros",))
def full(g: Group) -> Expr:
    """Make every parameter trainable, weights and vectors alike: W trains as a plain float32 matrix that starts at W.

    A compressed weight becomes dense, and its zeros train too. Adapters stay beside it.
    """
    if not isinstance(g.now, Dense):
        g.fallback(f"{g.now.describe()} became dense: it trains from today's value")
    return unfrozen(g.now)


@full.claim("gains more on a shifted domain than its norms alone, after the same steps")
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("full", {})], baseline=[("layernorm", {})], share=1.0)
