"""What compiled code calls without compiling it. Imported when it is first called, as it imports torch's compiler: seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from weft.expr.base import Expr
    from weft.expr.basis import Basis


@torch.compiler.disable  # a node that is made on the way cannot be compiled; the whole table would be too much
def frozen_rows(expr: Expr, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b n"]:
    """The rows of a frozen expression with these indices: no others are made dense."""
    return expr.take(ids.flatten()).dense().view(*ids.shape, expr.shape[1])


@torch.compiler.disable  # hashes are NumPy's
def tables(expr: Basis, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a basis is generated as."""
    return expr.tables(dtype)
