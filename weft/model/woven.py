"""The modules of a woven model: linear layers, convolutions and embeddings whose weight is an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.error import ConflictError
from weft.expr import CHUNK, Dense, Expr, dense_copy, terms_of
from weft.model.integers import tapped
from weft.model.standin import StandIn
from weft.model.taps import Tap, folded


class Woven(nn.Module):
    """What woven modules share: an expression where the weight was."""

    expr: Expr
    tap: Tap | None
    """What the input goes through first; only linear layers have one."""
    compute: torch.dtype
    stored: Callable[[Tensor], Tensor]
    """The value [m n] as the module's weight."""
    features: ClassVar[int] = -1
    """The dimension of its output that has the weight's rows."""
    lookup: Callable[[Tensor, Tensor], Tensor] | None = None
    """Sees an embedding's ids and rows, before what a subclass makes of them."""
    speed: bool = False
    """Whether it runs on a dense copy of what is frozen, which is kept with the expression."""

    @property
    def weight(self) -> Tensor:
        """A read-only stand-in: free metadata; any operation on it makes the value dense, before the tap's turns."""
        return StandIn.of(self.expr if self.tap is None else folded(self.expr, self.tap), self.compute, self.stored)

    def resident(self, dtype: torch.dtype, device: str) -> tuple[Tensor | None, list[Expr]]:
        """The dense copy that such inputs are multiplied with, and the terms that it leaves out; None where there is no such copy."""
        if (
            not self.speed
            or torch.compiler.is_compiling()
            or not (dtype == self.compute or torch.is_autocast_enabled(device))
        ):
            return None, []
        return dense_copy(self.expr, self.compute)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the tap makes of x times the transposed value, and the bias."""
        copy, live = self.resident(x.dtype, x.device.type)
        if copy is None:
            y = self.expr(x) if self.tap is None else tapped(self.expr, self.tap, x)
            return y if bias is None else y + bias.to(y.dtype)
        x = self.inputs(x)
        y = F.linear(x, copy, bias if bias is None else bias.to(copy.dtype))
        for term in live:
            y = y + term(x)
        return y

    def inputs(self, x: Tensor) -> Tensor:
        """What the weight is multiplied with, features last."""
        return x if self.tap is None else self.tap(x)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ConflictError(
                "a woven weight cannot be assigned",
                where=type(self).__name__,
                got="weight = ...",
                want="a rewrite",
                fix="weft.unweave(model) first",
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.compute = fn(torch.empty(0, dtype=self.compute)).dtype
        return super()._apply(fn, recurse)


class WovenLinear(Woven, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer whose weight is an expression."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.tap is None
            and self.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
            and isinstance(self.expr, Dense)
            and (self.expr.w.dtype == input.dtype or self.expr.w.numel() <= CHUNK // 16)
        ):
            return F.linear(input, self.expr.w.to(input.dtype), self.bias.to(input.dtype))
        return self.product(input, self.bias)


class _WovenConv(Woven):
    """A convolution whose weight [out in *kernel] is an expression [out, in * kernel]; it runs as a convolution."""

    features = 1
    kernel_size: tuple[int, ...]
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        copy, live = self.resident(input.dtype, input.device.type)
        if copy is None:
            terms = list(terms_of(self.expr).values())
            live = [t for t in terms if not t.frozen()]
            y = _FrozenConv.apply(input, self, [t for t in terms if t.frozen()])
        else:
            y = self.run(input, copy)
        for term in live:
            y = y + self.run(input, term.dense())
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * len(self.kernel_size))

    def run(self, input: Tensor, value: Tensor) -> Tensor:
        """The convolution with this value [m n]."""
        return cast(Any, self)._conv_forward(input, self.stored(value).to(input.dtype), None)

    def inputs(self, x: Tensor) -> Tensor:
        conv, flat = cast(Any, self), len(self.kernel_size) == 1
        padding = conv.padding
        if isinstance(padding, str) or conv.padding_mode != "zeros":
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x, padding = F.pad(x, conv._reversed_padding_repeated_twice, mode), (0,) * len(self.kernel_size)
        how = [self.kernel_size, conv.dilation, padding, conv.stride]
        if flat:
            x, how = x.unsqueeze(-2), [(edge, *given) for edge, given in zip((1, 1, 0, 1), how, strict=True)]
        return F.unfold(x, *how).movedim(1, -1)


class _FrozenConv(torch.autograd.Function):
    """A convolution with frozen weights whose backward makes them dense again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: _WovenConv, terms: list[Expr]) -> Tensor:
        ctx.of = (x.shape, module, terms)
        return module.run(x, _total(module, terms))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shape, module, terms = ctx.of
        with torch.enable_grad():  # linear in x: the gradient is the same anywhere
            x = grads[0].new_zeros(shape).requires_grad_()
            y = module.run(x, _total(module, terms))
        return torch.autograd.grad(y, x, grads[0])[0], None, None


def _total(module: _WovenConv, terms: list[Expr]) -> Tensor:
    """The sum of these terms' values; zeros for none."""
    if not terms:
        return torch.zeros(module.expr.shape, device=next(module.expr.parameters()).device)
    value = terms[0].dense()
    for term in terms[1:]:
        value = value + term.dense()
    return value


class WovenConv2d(_WovenConv, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A two-dimensional convolution."""


class WovenConv1d(_WovenConv, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A one-dimensional convolution."""


class WovenEmbedding(Woven, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An embedding whose table is an expression."""

    def forward(self, input: Tensor) -> Tensor:
        copy, live = self.resident(self.compute, input.device.type)
        rows = self.expr.rows(input) if copy is None else F.embedding(input, copy)
        for term in live if copy is not None else ():
            rows = rows + term.rows(input)
        rows = rows.to(self.compute)
        return rows if self.lookup is None else self.lookup(input, rows)
