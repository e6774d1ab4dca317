"""Put the few entries that a member's skill depends on into the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from weft.engine import Sources, method
from weft.expr import Expr, SparseDelta, fork, total
from weft.linalg.votes import trimmed

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P154", paper="2302.06600", needs={"base", "fisher"}, signed=True, adds=True)
def graft(
    s: Sources,
    *,
    density: Annotated[float, Field(gt=0, le=1, description="share of each task vector that is kept")] = 0.05,
) -> Expr:
    """base + Σ_k w_k m_k d_k, d_k = member_k - base, m_k one at the entries of each weight that have the largest F_k d_k², else zero.

    F_k d_k² / 2 is what the member loses without an entry, F_k the diagonal of its Fisher information on its own data; of vectors d_k².
    The base keeps its expression; each member is a sparse term beside it. Departure from the paper, which trains the mask: it is chosen.
    """
    members: dict[str, Expr] = {}
    for k, (w, d) in enumerate(zip(s.weights, s.deltas(), strict=True)):
        costs = d * d * (s.fishers[k] if s.fishers else torch.ones(()))
        members[f"adapter:graft-{k + 1}"] = SparseDelta.of((w * d).to(s.dtype), trimmed(costs, density) != 0)
    return total({"base": fork(s.origin), **members})


@graft.claim("of one member, a twentieth of what tuning changed, so chosen, gains more than its largest entries do")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("graft", {}), baseline=("ties", {"density": 0.05}), members="tasks", count=1)
