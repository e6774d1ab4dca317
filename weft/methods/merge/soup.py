"""Average models that were tuned from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.engine import Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P014", paper="2203.05482")
def soup(s: Sources) -> Expr:
    """The mean Σ_k w_k member_k / Σ_k w_k; members that share a base but for low-rank and sparse terms keep it."""
    return s.linear(s.shares(), s.members[0])


@soup.claim("members tuned alike but for their seed are better averaged than the best of them alone")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("soup", {}), baseline="best", members="seeds")
