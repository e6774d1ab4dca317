"""A weight that trains on the grid that it will be stored on."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from weft.error import ShapeError
from weft.expr.base import Expr, Promises
from weft.expr.nodes import Quantized, spread


class SoftQuantized(Expr):
    """What a weight rounds to on a grid of integers. value = s clamp(round(w / s), -2^(bits-1), 2^(bits-1) - 1), s a step a group.

    s is |step| rounded to bfloat16, 1 where that is zero, so that `hard` holds this very value. Gradients are those of LSQ (arXiv
    1902.08153): w has the value's within the range and none outside; a step's is round(w / s) - w / s, or the end of the range, times
    1 / sqrt(size of the group · (2^(bits-1) - 1)).
    """

    w: Float[Tensor, "m n"]
    step: Float[Tensor, "m g"]
    bits: int
    group: int
    soft: ClassVar[bool] = True

    def check(self) -> None:
        groups = math.ceil(self.shape[1] / (self.group or self.shape[1] or 1))
        if not 2 <= self.bits <= 8 or self.group < 0 or self.step.shape[1] != groups:
            got = f"{self.bits} bits, {self.step.shape[1]} steps a row, groups of {self.group}"
            want, fix = f"2 to 8 bits, {groups} steps a row", "give a step for every group"
            raise ShapeError("these steps do not fit", where="SoftQuantized", got=got, want=want, fix=fix)

    def dense(self) -> Float[Tensor, "m n"]:
        return cast(Tensor, _Rounded.apply(self.w, self.step, self.bits, self.group))

    def hard(self) -> Quantized:
        with torch.no_grad():
            wide, size = _steps(self.w, self.step, self.group)
            codes = (_codes(wide / spread(size, self.group, self.shape[1]), self.bits) + 2 ** (self.bits - 1)).byte()
        return Quantized.encode(codes, size.float(), None, grid=f"int{self.bits}", group=self.group)

    def promises(self) -> Promises:
        return Promises(levels=2**self.bits)

    def describe(self) -> str:
        return f"soft int{self.bits}[{f'g{self.group}' if self.group else 'channel'}]"


class _Rounded(torch.autograd.Function):
    """The value, with the gradients of LSQ."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, bits: int, group: int) -> Tensor:
        ctx.save_for_backward(w, step)
        ctx.how = bits, group
        wide, size = _steps(w, step, group)
        each = spread(size, group, w.shape[1])
        return _codes(wide / each, bits) * each

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (w, step), (bits, group), (grad,) = ctx.saved_tensors, ctx.how, grads
        wide, size = _steps(w, step, group)
        at = wide / spread(size, group, w.shape[1])
        codes, inside = _codes(at, bits), (at >= -(2 ** (bits - 1))) & (at <= 2 ** (bits - 1) - 1)
        pull, length = grad * torch.where(inside, codes - at, codes), group or w.shape[1]
        by_group = torch.nn.functional.pad(pull, (0, -w.shape[1] % length)).unflatten(1, (-1, length)).sum(-1)
        counts = torch.full_like(size[:1], length)
        counts[:, -1] = w.shape[1] - length * (size.shape[1] - 1)
        slope = by_group * step.sign() / (counts * (2 ** (bits - 1) - 1)).sqrt()
        return (grad * inside).to(w.dtype), slope.to(step.dtype), None, None


def _steps(w: Tensor, step: Tensor, group: int) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m g"]]:
    """The weight in float32 at least, and the size of its steps."""
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    size = step.abs().to(torch.bfloat16).to(wide.dtype)
    return wide, torch.where(size <= 1e-30, torch.ones_like(size), size)


def _codes(at: Float[Tensor, "m n"], bits: int) -> Float[Tensor, "m n"]:
    return at.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
