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
    dtype, most, (m, n) = arithmetic(x), _most(x), expr.shape
    wide, slices = x.to(dtype), [*expr.row_slices(most)]
    if len(slices) < 2 or torch.is_autocast_enabled(x.device.type):
        parts = [F.linear(wide, part.dense().to(dtype)) for part in expr.slices(most)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if dtype == x.dtype else y.to(x.dtype)
    flat = wide.reshape(-1, n)
    y = flat.new_empty(len(flat), m)
    for rows, part in zip(slices, expr.slices(most), strict=True):
        torch.mm(flat, part.dense().to(dtype).T, out=y[:, rows])
    return y.view(*x.shape[:-1], m).to(x.dtype)


def product_transposed(g: Float[Tensor, "*b m"], expr: Expr) -> Float[Tensor, "*b n"]:
    """g times the value, a slice of rows at a time."""
    dtype, most, (m, n) = arithmetic(g), _most(g), expr.shape
    flat = g.to(dtype).reshape(-1, m)
    x = flat.new_empty(len(flat), n) if m else flat.new_zeros(len(flat), n)
    for rows, part in zip(expr.row_slices(most), expr.slices(most), strict=True):
        x.addmm_(flat[:, rows], part.dense().to(dtype), beta=float(rows.start > 0))
    return x.view(*g.shape[:-1], n).to(g.dtype)


def _most(x: Tensor) -> int | None:
    """Dense entries at a time in a product with x; None where there is no need for few."""
    return CACHED if x.device.type == "cpu" else None


def arithmetic(x: Tensor) -> torch.dtype:
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
