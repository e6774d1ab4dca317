"""Rotate the residual stream and the heads' values, so that no feature stands out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from weft.engine import Rotate, Span, method
from weft.expr import hadamard
from weft.model import rotation

if TYPE_CHECKING:
    from weft.lab.claims import Claim, Lab


@method(kind="transport", paper="2405.16406", on=("residual", "value"))
def rotate(
    a: Span,
    *,
    how: Annotated[
        Literal["hadamard", "random"],
        Field(description="Hadamard with random signs, mixed at random where the width is no power of two; or Haar"),
    ] = "hadamard",
) -> Rotate:
    """Turn the stream by one orthogonal matrix (R1 of SpinQuant, Q of QuaRot) and each head's values by another (R2).

    x' = Q x; what writes x becomes Q W, what reads it W Qᵀ. The output stays as it is; norms are folded into what reads them, which
    unties a tied head. Where norms subtract the mean, Q is random and keeps the vector of ones.
    """
    d, seed = a.axis.size // a.axis.blocks, int(torch.randint(1 << 31, (), generator=a.writers.rng("rotate")))
    turned = rotation(a.axis, seed=seed)
    if how == "random" or a.axis.centred:
        return turned
    power, rng = d & -d, torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (d,), generator=rng).double() * 2 - 1
    h = hadamard(torch.diag(signs), power).T  # blocks of H diag(signs)
    if power < d:
        odd = torch.linalg.qr(torch.randn(d // power, d // power, generator=rng, dtype=torch.float64))[0]
        h = torch.kron(odd, torch.eye(power, dtype=torch.float64)) @ h
    return Rotate(h.expand(a.axis.blocks, d, d))


@rotate.claim("4-bit rounding, one scale a row, loses less after it")
def claim(lab: Lab) -> Claim:
    rounding = ("rtn", {"bits": 4, "group": 0})
    return lab.only("ref-lm").compare(ours=[("rotate", {}), rounding], baseline=[rounding])
