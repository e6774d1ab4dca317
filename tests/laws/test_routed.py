"""Laws of what depends on the input: beside a loop over rows in float64, and without a value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weft.error import ConflictError, ShapeError
from weft.expr import Expr, Product, Promises, Routed, Sum, stack, terms_of, valueless

from .cases import ROUTED, dense, documented_output, instances, lowrank, randn, rng, trainable
from .test_nodes import (
    bytes_are_counted,
    casts_spare_bytes,
    close,
    copies_are_equal_and_apart,
    forks_part_ways,
    inputs,
    narrow,
    written_and_read_it_is_the_same,
)


def looped(e: Expr, row: Tensor) -> Tensor:
    """What a tree makes of one row [n] in float64, by its definition."""
    if isinstance(e, Sum):
        return torch.stack([looped(t, row) for t in e.kids()]).sum(0)
    if isinstance(e, Product):
        for factor in reversed(list(e.kids())):
            row = looped(factor, row)
        return row
    if not isinstance(e, Routed):
        return e.dense().double() @ row
    scores = [(e.router[i].double() * row).sum().exp() for i in range(len(e.router))]
    shares = [s / torch.stack(scores).sum() for s in scores]
    best = sorted(range(len(shares)), key=lambda i: (-float(shares[i].detach()), i))[: e.top]
    return torch.stack([shares[i] * looped(e.experts[i], row) for i in best]).sum(0)


def loop(e: Expr, x: Tensor) -> Tensor:
    """Every row alone."""
    return torch.stack([looped(e, row) for row in x.double().flatten(0, -2)]).view(*x.shape[:-1], -1)


def forward_is_the_loop(e: Expr) -> None:
    """For inputs of any shape, in slices, for no rows at all, and in x's dtype."""
    x = inputs(e, 2, 3)
    want = loop(e, x).float()
    close(e(x), want)
    with narrow():
        close(e(x), want)
    assert e(x[:0]).shape == (0, 3, e.shape[0])
    half = x.bfloat16()
    made, want = e(half), loop(e, half).float()
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def the_document_reads_it(e: Expr) -> None:
    """The reader in docs/files.md makes the same of inputs, from the saved tree and tensors."""
    x = inputs(e, 6)
    close(documented_output(e, x).float(), e(x))


def rows_do_not_see_each_other(e: Expr) -> None:
    """A row's result is its own, whatever is beside it."""
    x = inputs(e, 6)
    close(torch.cat([e(row[None]) for row in x]), e(x))


def a_slice_gives_those_outputs(e: Expr) -> None:
    """take cuts outputs and leaves the routing; slices stack to the whole."""
    x, part = inputs(e, 5), slice(e.shape[0] // 3, e.shape[0] // 3 + 2)
    close(e.take(part)(x), e(x)[:, part])
    close(e.take(torch.tensor([e.shape[0] - 1, 0]))(x), e(x)[:, [e.shape[0] - 1, 0]])
    with narrow():
        parts = list(e.slices())
    close(stack(parts)(x), e(x))


def gradients_are_the_loops(e: Expr) -> None:
    """Of inputs, of the router and of every expert; zero for an expert that no row chose."""
    e, weigh = trainable(e), randn(rng("out"), 4, e.shape[0])
    x = inputs(e, 4).requires_grad_()
    leaves = [x, *(p for p in e.parameters() if p.requires_grad)]
    made = torch.autograd.grad((e(x) * weigh).sum(), leaves)
    want = torch.autograd.grad((loop(e, x) * weigh).sum(), leaves, allow_unused=True)
    for a, b in zip(made, want, strict=True):
        close(a, torch.zeros_like(a) if b is None else b)


def it_has_no_value(e: Expr) -> None:
    """What asks for one is told which term is to blame; nothing is promised of it."""
    assert not e.is_matrix and e.mask() is None and e.promises() == Promises()
    for ask in (e.dense, lambda: e.rows(torch.tensor([0]))):
        with pytest.raises(ConflictError, match="depends on the input"):
            ask()
    (problem,) = valueless({"site": e, "other": dense(2, 3, rng())})
    assert problem.where == "site"
    assert [r for r, t in terms_of(e).items() if not t.is_matrix] == [
        s.split(" is ")[0] for s in str(problem.got).split("; ")
    ]


LAWS: list[Callable[[Expr], None]] = [
    forward_is_the_loop,
    the_document_reads_it,
    rows_do_not_see_each_other,
    a_slice_gives_those_outputs,
    gradients_are_the_loops,
    it_has_no_value,
    written_and_read_it_is_the_same,
    bytes_are_counted,
    casts_spare_bytes,
    copies_are_equal_and_apart,
    forks_part_ways,
]


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_routed(law: Callable[[Expr], None], kind: str) -> None:
    """Each law, for each kind of expression, over all shapes."""
    for e in instances(kind):
        law(e)


def test_equal_experts_are_taken_in_order() -> None:
    """A router of zeros gives every row the first experts, at equal weight."""
    g = rng("ties")
    e = Routed(torch.zeros(5, 7), [dense(3, 7, g) for _ in range(5)], 2)
    x = randn(g, 4, 7)
    close(e(x), x @ (e.experts[0].dense() + e.experts[1].dense()).T / 5)


def test_what_does_not_fit_is_named() -> None:
    """Experts of two shapes, or not one a row of the router, or of other inputs; and a count that is none."""
    g = rng("misfits")
    three = [lowrank(4, 6, g) for _ in range(3)]
    for router, experts, top, field in (
        (randn(g, 3, 6), [*three[:2], lowrank(5, 6, g)], 1, "experts"),
        (randn(g, 2, 6), three, 1, "experts"),
        (randn(g, 3, 5), three, 1, "experts"),
        (randn(g, 3, 6), three, 0, "top"),
        (randn(g, 3, 6), three, 4, "top"),
    ):
        with pytest.raises(ShapeError) as caught:
            Routed(router, experts, top)
        assert caught.value.where == f"Routed.{field}"
