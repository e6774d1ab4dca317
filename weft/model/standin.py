"""A tensor that stands where a woven module's weight was: metadata is free, use makes it dense, writes are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from weft.error import ConflictError
from weft.expr import Expr, tensors


class StandIn(Tensor):
    """The weight of a woven module as code that reads `.weight` sees it. `StandIn.made` counts the times it was made dense."""

    made: int = 0
    expr: Expr
    stored: Callable[[Tensor], Tensor]

    @staticmethod
    def of(expr: Expr, dtype: torch.dtype, stored: Callable[[Tensor], Tensor]) -> StandIn:
        """A stand-in for the expression's value in `dtype`, as `stored` shapes it."""
        first = next(iter(tensors(expr).values()))
        shape = stored(torch.empty(expr.shape, device="meta")).shape
        self: StandIn = Tensor._make_wrapper_subclass(StandIn, shape, dtype=dtype, device=first.device)
        self.expr, self.stored = expr, stored
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StandIn({list(self.shape)}, {self.dtype}, {self.expr.describe()})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {**dict(zip((s.name for s in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        written = [
            given.get(s.name) for s in func._schema.arguments if s.alias_info is not None and s.alias_info.is_write
        ]
        if any(isinstance(a, StandIn) for a in tree_leaves(written)):
            raise ConflictError(
                "a woven weight cannot be written",
                where=str(func),
                got="an in-place write",
                want="a rewrite",
                fix="weft.unweave(model) first",
            )

        def dense(t: Any) -> Any:
            if not isinstance(t, StandIn):
                return t
            StandIn.made += 1
            return t.stored(t.expr.dense().detach()).to(t.dtype, copy=True)  # a copy: views of it may be written

        if func is torch.ops.aten.detach.default:
            return StandIn.of(args[0].expr, args[0].dtype, args[0].stored)
        return func(*tree_map(dense, args), **tree_map(dense, dict(kwargs or {})))
