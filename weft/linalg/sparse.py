"""Quantize the entries that an expression keeps: all of a dense one, the kept ones of a sparse one."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, UInt8
from torch import Tensor

from weft.expr import Expr, Quantized
from weft.linalg.grids import Fitted

Round = Callable[[Float[Tensor, "m k"]], tuple[Fitted, UInt8[Tensor, "m k"]]]


def quantize(now: Expr, round_: Round) -> Expr:
    """`now` with its values on the grid that `round_` fits to them; a zero pattern stays."""
    kept = getattr(now, "kept", None)
    if isinstance(kept, Expr):
        return now.rebuild(kept=quantize(kept, round_))
    fit, codes = round_(now.dense())
    return Quantized.encode(codes, fit.scales, fit.zeros, grid=fit.name, group=fit.group)
