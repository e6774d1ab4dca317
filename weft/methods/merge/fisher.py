"""Average every entry by how much each member's output depends on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weft.engine import Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", paper="2111.09832", needs={"fisher"})
def fisher(s: Sources) -> Expr:
    """Σ_k w_k F_k member_k / Σ_k w_k F_k, entry by entry, F_k the diagonal of the Fisher information of member k on its own data.

    Where all F_k are zero, and for vectors, the weighted mean. The labels are drawn from the member, as in the paper; a tied weight
    has the information of both its uses.
    """
    if not s.fishers:
        return s.linear(s.shares(), s.members[0])
    mean, whole, pull = s.mean(), torch.zeros(()), torch.zeros(())
    for w, v, f in zip(s.shares(), s.values(), s.fishers, strict=True):
        whole, pull = whole + w * f.double(), pull + w * f.double() * (v.double() - mean)
    return s.dense(mean + torch.where(whole > 0, pull / whole, 0.0))


@fisher.claim("merges members tuned on different tasks better than averaging them does")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("fisher", {}), baseline=("soup", {}), members="tasks")
