"""GPT-2's layers, woven; apart, because they are transformers', whose import takes longer than a small merge."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weft.model.woven import Woven


class WovenConv1D(Woven, Conv1D):  # pyright: ignore[reportIncompatibleVariableOverride]
    """GPT-2's linear layer, whose weight is stored as [inputs outputs]; its expression is [outputs inputs] like any other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)
