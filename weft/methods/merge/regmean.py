"""Average so that every member's layers give what they gave on its own data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2212.09849", needs={"gram"})
def regmean(
    s: Sources,
    *,
    cross: Annotated[
        float, Field(ge=0, le=1, description="off-diagonal entries of Grams are multiplied by this")
    ] = 0.9,
) -> Expr:
    """argmin_W Σ_k w_k tr((W - member_k) G_k (W - member_k)ᵀ) = (Σ_k w_k member_k G_k) (Σ_k w_k G_k)⁻¹.

    G_k = E[x xᵀ] of the member's inputs on its own data, off-diagonal entries times `cross`. What no input reaches, and embeddings and
    vectors, have the weighted mean. Departure from the paper: Grams are means over tokens, not sums, so that more data is no more weight.
    """
    grams = [g.double() for g in s.grams if g is not None]
    if len(grams) < len(s.members):
        if s.grams:
            s.fallback("no input of a member was seen: the weighted mean was taken")
        return s.linear(s.shares(), s.members[0])
    mean, whole, pull = s.mean(), torch.zeros(()), torch.zeros(())
    for w, v, g in zip(s.shares(), s.values(), grams, strict=True):
        g = g * (cross + (1 - cross) * torch.eye(len(g)))
        whole, pull = whole + w * g, pull + w * (v.double() - mean) @ g
    ridge = 1e-9 * whole.diagonal().mean().clamp(min=1e-30) * torch.eye(len(whole))
    return s.dense(mean + torch.linalg.solve(whole + ridge, pull, left=False))


@regmean.claim("merges members tuned on different tasks better than averaging them does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("regmean", {}), baseline=("soup", {}), members="tasks")
