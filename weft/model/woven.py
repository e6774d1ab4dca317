"""The modules of a woven model: a linear layer and an embedding whose weight is an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.error import ConflictError
from weft.expr import CHUNK, Dense, Expr
from weft.model.standin import StandIn


class _Woven(nn.Module):
    """What woven modules share: an expression where the weight was."""

    expr: Expr
    compute: torch.dtype

    @property
    def weight(self) -> Tensor:
        """A read-only stand-in: free metadata; any operation on it makes the value dense."""
        return StandIn.of(self.expr, self.compute)

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


class WovenEmbedding(_Woven, nn.Embedding):  # pyright: ignore[reportIncompatibleVariableOverride]
    """An embedding whose table is an expression."""

    def forward(self, input: Tensor) -> Tensor:
        return self.expr.rows(input).to(self.compute)
