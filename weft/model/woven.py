"""The modules of a woven model: linear layers, stored either way round, and embeddings, whose weight is an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.error import ConflictError
from weft.expr import CHUNK, Dense, Expr
from weft.model.standin import StandIn


class _Woven(nn.Module):
    """What woven modules share: an expression where the weight was."""

    expr: Expr
    compute: torch.dtype
    turned: ClassVar[bool] = False
    """Whether the module's weight is the transposed value."""

    @property
    def weight(self) -> Tensor:
        """A read-only stand-in: free metadata; any operation on it makes the value dense."""
        return StandIn.of(self.expr, self.compute, turned=self.turned)

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


class WovenLinear(_Woven, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer whose weight is an expression."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.bias is not None  # pyright: ignore[reportUnnecessaryComparison]
            and isinstance(self.expr, Dense)
            and (self.expr.w.dtype == input.dtype or self.expr.w.numel() <= CHUNK // 16)
        ):
            return F.linear(input, self.expr.w.to(input.dtype), self.bias.to(input.dtype))
        y = self.expr(input)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # pyright: ignore[reportUnnecessaryComparison]


class WovenConv1D(_Woven, Conv1D):  # pyright: ignore[reportIncompatibleVariableOverride]
    """GPT-2's linear layer, whose weight is stored as [inputs outputs]; its expression is [outputs inputs] like any other."""

    turned = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.expr(x)
        return y + self.bias.to(y.dtype)


class WovenEmbedding(_Woven, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An embedding whose table is an expression."""

    def forward(self, input: Tensor) -> Tensor:
        return self.expr.rows(input).to(self.compute)
