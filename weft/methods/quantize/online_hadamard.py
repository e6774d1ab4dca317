"""Spread outliers: turn what weights read by a Hadamard matrix, and the weights back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from weft.engine import Group, method
from weft.expr import Hadamard

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="rewrite", paper="2404.00456", per="input", taps=True, whole=True, drops=("zeros",))
def online_hadamard(
    g: Group,
    *,
    block: Annotated[
        int, Field(ge=1, le=65536, description="most neighbours that are mixed; the block is the largest that fits")
    ] = 65536,
    signs: Annotated[bool, Field(description="flip random signs first")] = True,
) -> Group:
    """Read H x instead of x with W Hᵀ instead of W, H orthogonal: the same function, and no feature of x stands out.

    The block is the largest power of two up to `block` that divides the columns. Plain and low-rank terms are computed anew in
    their own dtype; a term of another kind keeps its codes and turns its input back, so turn before you quantize.
    """
    n = g.sites[0].now.shape[1]
    size = min(n & -n, 1 << (block.bit_length() - 1))
    by_name = replace(g, sites=tuple(sorted(g.sites, key=lambda s: s.name)))
    flips = torch.randint(2, (n,), generator=by_name.rng("signs")) * 2.0 - 1 if signs else torch.ones(n)
    return g.turned(Hadamard.of(flips, size))


@online_hadamard.claim("4-bit tokens cost less behind a Hadamard turn")
def claim(lab: Lab) -> Claim:
    four = ("act_quant", {"grid": "int4"})
    return lab.compare(ours=[("online_hadamard", {}), four], baseline=[four])
