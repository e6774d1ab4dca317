"""The gradient of a term's value, while a backward pass goes by: one weight's at a time, whatever the term is made of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from weft.expr import Expr

Tell = Callable[[Float[Tensor, "m n"]], None]
WAYS = ("dense", "forward", "rows")
"""What a node is asked for while a model runs."""


@contextmanager
def watched(terms: Iterable[tuple[Expr, Tell]]) -> Generator[None]:
    """Within, every backward pass tells the gradient of each term's value [m n], in float32: once for each of its uses.

    It lives until `tell` returns, so that one weight's is in memory at a time.
    """
    with ExitStack() as after:
        for term, tell in terms:
            _watch(term, tell)
            after.callback(_unwatch, term)
        yield


def _watch(term: Expr, tell: Tell) -> None:
    inside = [False]  # a product may go by way of `dense`, which must not tell again

    def outermost(way: str) -> Callable[..., Tensor]:
        plain = cast(Callable[..., Tensor], getattr(term, way))

        def run(*x: Tensor) -> Tensor:
            if inside[0]:
                return plain(*x)
            inside[0] = True
            try:
                y = plain(*x)
            finally:
                inside[0] = False
            return cast(Tensor, _Told.apply(y, way, term.shape, tell, *x))

        return run

    for way in WAYS:
        term.__dict__[way] = outermost(way)


def _unwatch(term: Expr) -> None:
    for way in WAYS:
        del term.__dict__[way]


class _Told(torch.autograd.Function):
    """Its input as it is; the backward tells what the gradient of the term's value is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, way: str, shape: tuple[int, int], tell: Tell, *x: Tensor) -> Tensor:
        ctx.of = way, shape, tell
        ctx.save_for_backward(*x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (way, shape, tell), x, grad = ctx.of, ctx.saved_tensors, grads[0].float()
        if way == "forward":
            found = grad.flatten(0, -2).T @ x[0].float().flatten(0, -2)
        elif way == "rows":
            ids = x[0].flatten()
            found = grad.new_zeros(shape).index_add_(0, ids, grad.reshape(len(ids), -1))
        else:
            found = grad
        tell(found)
        return (grads[0], *[None] * (3 + len(x)))
