"""Products of whole numbers: int8 codes of activations and of weights, summed exactly in int32, then scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from weft.expr import Expr, Quantized, Sum
from weft.expr.products import product_transposed
from weft.grid import grid
from weft.model.taps import Tap

SHORT = 1 << 10
"""Columns up to which every sum of products of two int8 is a whole number in float32."""
LONGEST = 1 << 17
"""Columns under which no sum of products of two int8 leaves int32."""


def tapped(expr: Expr, tap: Tap, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
    """expr(tap(x)). The base term's product is one of int8 codes where both sides are such; other terms read the rounded floats."""
    seen = tap.seen(x)
    base, rest = _split(expr)
    if base is None or seen.codes is None or x.device.type not in ("cpu", "cuda"):
        return expr(seen.value)
    y = cast(Tensor, _IntegerProduct.apply(x, *seen.codes, base, tap))
    for term in rest:
        y = y + term(seen.value)
    return y


def _split(expr: Expr) -> tuple[Quantized | None, list[Expr]]:
    """The base term as a weight that multiplies in whole numbers (None: it does not), and the other terms."""
    terms = expr.named() if isinstance(expr, Sum) else {"base": expr}
    base, rest = terms.get("base"), [t for role, t in terms.items() if role != "base"]
    if not isinstance(base, Quantized) or grid(base.grid).levels is not None:
        return None, rest
    return (base if base.symmetric and base.groups == 1 and base.n < LONGEST else None), rest


class _IntegerProduct(torch.autograd.Function):
    """x times the transposed weight by their codes. The gradient is that of the float product, as a tap gives it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, base: Quantized, tap: Tap) -> Tensor:
        ctx.of = (base, tap)
        parts = [_scaled(codes, scales, cast(Quantized, part)) for part in base.slices()]
        return torch.cat(parts, -1).view(*x.shape[:-1], base.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        base, tap = ctx.of
        return tap.back(product_transposed(grads[0], base)), None, None, None, None


def _scaled(codes: Int8[Tensor, "t n"], scales: Float[Tensor, "#t 1"], weight: Quantized) -> Float[Tensor, "t m"]:
    whole = (weight.codes().short() - 2 ** (grid(weight.grid).bits - 1)).to(torch.int8)
    return integer_product(codes, whole).float() * scales * weight.scales().T


def integer_product(x: Int8[Tensor, "t n"], w: Int8[Tensor, "m n"]) -> Int32[Tensor, "t m"]:
    """x wᵀ, exact: by int8 kernels where the processor is made for them, else in float32, whose sums of so few columns are whole."""
    if has_kernel(x.device):
        a, b = padded(x, w) if x.device.type == "cuda" else (x, w)
        return torch.ops.aten._int_mm(a, b.T)[: len(x), : len(w)]
    made = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for at in range(0, x.shape[1], SHORT):
        a, b = (t[:, at : at + SHORT].float() for t in (x, w))
        made += (a @ b.T).int()
    return made


def has_kernel(device: torch.device) -> bool:
    """Whether int8 products are faster than float32 there; without VNNI a CPU takes them one by one."""
    vnni = cast("Callable[[], bool]", getattr(torch.cpu, "_is_vnni_supported", lambda: False))
    return device.type == "cuda" or vnni()


def padded(x: Int8[Tensor, "t n"], w: Int8[Tensor, "m n"]) -> tuple[Int8[Tensor, "r k"], Int8[Tensor, "s k"]]:
    """Both with rows and columns of zeros, as the CUDA kernel wants them: multiples of 8, and more than 16 rows of x."""
    wide, rows = -x.shape[1] % 8, max(24, len(x) + -len(x) % 8)
    return F.pad(x, (0, wide, 0, rows - len(x))), F.pad(w, (0, wide, 0, -len(w) % 8))
