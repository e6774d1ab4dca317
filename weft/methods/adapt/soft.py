"""Full fine-tuning that moves a weight's important rows less."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from weft.engine import Group, method
from weft.expr import Dense, Diagonal, Expr, Product, total

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", rows="P026", paper="2404.10306", needs={"gram"})
def soft(
    g: Group,
    *,
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", description="its name")] = "default",
) -> Expr:
    """Add a trainable matrix D, zero at the start, behind a mask of rows: W + diag(1 - I) D, with I[i] = tanh(c[i] / mean c).

    c[i] is what it is predicted to cost on the data to lose row i, weight_i w_i E[x xᵀ] w_iᵀ. The gradient and the step of a row both
    have the factor 1 - I[i]: as a factor of gradients alone, as in the paper, Adam would take it out again.
    """
    cost = _cost(g)
    if not bool((cost > 0).any()):
        g.fallback("no row matters to the data: all move alike")
    kept = 1 - torch.tanh(cost / cost.mean().clamp(min=1e-300))
    moved = Product(Diagonal(kept.float()), Dense(nn.Parameter(torch.zeros(g.now.shape))))
    return total({"base": g.now, f"adapter:{name}": moved})


def _cost(g: Group) -> Float[Tensor, "m"]:
    """What each row costs, over all uses of the weight."""
    g.gram()  # says so where no input was seen
    w = g.now.dense().detach().double()
    each = [e.weight.double().clamp(min=0) * ((w @ e.gram.double()) * w).sum(1) for e in g.site.evidence]
    return torch.stack(each).sum(0).clamp(min=0)


@soft.claim(
    "gains at least 90 % of what full fine-tuning of the same weights gains, though what matters to the data moves less"
)
def claim(lab: Lab) -> Claim:
    return lab.tune(ours=[("soft", {})], baseline=[("full", {})], share=0.9)
