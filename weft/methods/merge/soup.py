"""Average models that were tuned from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.engine import Sources, method
from weft.expr import Expr

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="merge", rows="P014 P022", paper="2203.05482")
def soup(s: Sources) -> Expr:
    """The mean Σ_k w_k member_k / Σ_k w_k; members that share a base but for low-rank and sparse terms keep it."""
    return s.linear(s.shares(), s.members[0])


@soup.claim("members tuned alike but for their seed are better averaged than the best of them alone")
def claim(lab: Lab) -> Claim:
    return lab.merge(ours=("soup", {}), baseline="best", members="seeds")


@soup.claim(
    "of members tuned at several rates, those that a greedy search keeps are better than the best alone", of="greedy"
)
def greedy(lab: Lab) -> Claim:
    return lab.merge(ours=("soup", {}), baseline="best", members="rates", search="greedy")


@soup.claim("weights found by evolution are better than equal ones, of members tuned at several rates", of="learned")
def learned(lab: Lab) -> Claim:
    return lab.merge(ours=("soup", {}), baseline=("soup", {}), members="rates", search="cma")


@soup.claim(
    "members tuned on different mixtures of data are better averaged than the best of them alone",
    of="mixtures",
    paper="2409.04828",
)
def mixtures(lab: Lab) -> Claim:
    return lab.merge(ours=("soup", {}), baseline="best", members="mixtures")
