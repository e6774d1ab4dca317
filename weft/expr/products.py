"""Dense products of frozen expressions: a slice of rows at a time, and again in the backward, so that nothing dense is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from weft.expr.base import Expr

CACHED = 1 << 20
"""Elements of a weight that are made dense at a time on a CPU: as many as its caches hold, which is several times faster."""
_KNOWN: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
SHORT = _KNOWN is not None and bool(_KNOWN())
"""Whether this CPU has arithmetic in bfloat16."""


def product(x: Float[Tensor, "*b n"], expr: Expr) -> Float[Tensor, "*b m"]:
    """x times the transposed value, a slice of rows at a time."""
    dtype = _arithmetic(x)
    wide = x.to(dtype)
    parts = [F.linear(wide, part.dense().to(dtype)) for part in expr.slices(_most(x))]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if dtype == x.dtype else y.to(x.dtype)


def product_transposed(g: Float[Tensor, "*b m"], expr: Expr) -> Float[Tensor, "*b n"]:
    """g times the value, a slice of rows at a time."""
    x, dtype, most = None, _arithmetic(g), _most(g)
    for rows, part in zip(expr.row_slices(most), expr.slices(most), strict=True):
        y = g[..., rows].to(dtype) @ part.dense().to(dtype)
        x = y if x is None else x.add_(y)
    return x.to(g.dtype) if x is not None else g.new_zeros(*g.shape[:-1], expr.shape[1])


def _most(x: Tensor) -> int | None:
    """Dense entries at a time in a product with x; None where there is no need for few."""
    return CACHED if x.device.type == "cpu" else None


def _arithmetic(x: Tensor) -> torch.dtype:
    """What a product with x is computed in: its dtype, or float32 where a CPU has no arithmetic in bfloat16 and is slow in it."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not SHORT
    return torch.float32 if slow else x.dtype


class FrozenProduct(torch.autograd.Function):
    """A product with a frozen weight whose backward makes the weight dense again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expr: Expr, passing: bool = False) -> Tensor:
        """`passing`: the expression is made for this product alone, so that a layout for it would not pay."""
        ctx.expr = expr
        return product(x, expr) if passing else expr.times(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return product_transposed(grads[0], ctx.expr), None, None
