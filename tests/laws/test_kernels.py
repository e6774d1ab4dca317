"""Laws of packed products: as accurate as the dense product, with its gradients, from a layout that is never stale."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from weft.expr import Blocks, Expr, Masked, Product, Quantized, Sum, fork, kernels
from weft.expr.kernels import KERNELS, kernel
from weft.grid import GRIDS, SCALES, grid

from .cases import PLACES, compensated, lowrank, quantized, randn, rng

SIZES = ((1, 1), (24, 40), (100, 100), (7, 256), (33, 300), (16, 130))
GROUPS = (0, 16, 32, 48, 64, 128, 256, 320)
BY_NAME = {k.name: k for k in KERNELS}
INTS = {"int2", "int3", "int4", "int5", "int6", "int7", "int8"}
TAKEN = {
    "int4pack": {"int2", "int3", "int4", "sign", "ternary"},
    "int8pack": INTS | {"ternary", "fp4", "fp6_e2m3"},
    "bag": INTS | {"sign", "ternary", "fp4", "fp6_e2m3"},
}


def leaf(m: int, n: int, name: str = "int4", group: int = 32, symmetric: bool = True, scale: str = "bf16") -> Quantized:
    """A random quantized leaf."""
    made = quantized(m, n, rng(m, n, name, group, symmetric, scale), name, group, symmetric, scale)
    assert isinstance(made, Quantized)
    return made


_HELD = functools.cache(leaf)


def leaves(name: str) -> Iterator[Quantized]:
    """What a kernel takes of every grid, with and without zero points, in every group and size, in one scale format or another.

    Of the groups that hold a whole row, the two smallest: 0, and the least that is no less than the columns.
    """
    for i, (m, n) in enumerate(SIZES):
        for j, group in enumerate(GROUPS):
            if group >= n and any(n <= other < group for other in GROUPS):
                continue
            for k, (place, symmetric) in enumerate(PLACES):
                e = _HELD(m, n, place, group, symmetric, list(SCALES)[(i + j + k) % len(SCALES)])
                if BY_NAME[name].rows(e):
                    yield e


def tops(e: Quantized) -> Tensor:
    """The largest magnitude that the grid has with each entry's scale."""
    spec = grid(e.grid)
    return e.spread(e.scales()).double() * (2.0**spec.bits if spec.levels is None else spec.top)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_packed_product_is_the_product(name: str, rows: int) -> None:
    """The error is that of float32 sums and of the result's last bit: less than a dense product's, whose weights are rounded."""
    taken, found = set[str](), BY_NAME[name]
    for e in leaves(name):
        taken.add(e.grid)
        dense, reach = e.dense().double(), tops(e)
        for dtype in found.dtypes:
            x = randn(rng("x", e.shape, rows), rows, e.shape[1]).to(dtype)
            made, exact, size = found.multiply(x, e, found.lay_out(e)), x.double() @ dense.T, x.double().abs()
            assert made.dtype == dtype and made.shape == exact.shape
            sums = 4 * torch.finfo(torch.float32).eps * (size @ reach.T)
            allowed = sums + torch.finfo(dtype).eps * exact.abs()
            assert bool(((made.double() - exact).abs() <= allowed).all()), (e.describe(), e.shape, dtype)
    assert taken == TAKEN[name]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_of_one_sign_lose_nothing(dtype: torch.dtype, symmetric: bool, rows: int) -> None:
    """Where inputs have a large mean, no offset's rounding adds up over them."""
    e = leaf(48, 512, "int4", 128, symmetric)
    x = (randn(rng("mean"), rows, 512) + 3).to(dtype)
    exact = x.double() @ e.dense().double().T
    assert kernel(e, dtype, rows) is not None
    last = torch.finfo(dtype).eps * exact.abs()
    assert bool(((e(x).double() - exact).abs() <= last + 1e-6 * (x.double().abs() @ e.dense().double().abs().T)).all())


CHOSEN = {
    ("int4", 64, True, "bf16", torch.bfloat16): "int4pack",
    ("int4", 64, False, "bf16", torch.bfloat16): "int4pack",
    ("int3", 0, True, "bf16", torch.bfloat16): "int4pack",
    ("ternary", 96, True, "e8m0", torch.bfloat16): "int4pack",
    ("int4", 64, True, "uint8", torch.bfloat16): "bag",
    ("int4", 48, True, "bf16", torch.bfloat16): "bag",
    ("int8", 0, True, "bf16", torch.bfloat16): "int8pack",
    ("int8", 64, True, "bf16", torch.bfloat16): "bag",
    ("fp4", 16, True, "e4m3", torch.bfloat16): "bag",
    ("int4", 64, True, "bf16", torch.float32): "bag",
    ("int8", 0, True, "bf16", torch.float32): "bag",
    ("int4", 8, True, "bf16", torch.float32): None,
    ("int8", 0, False, "bf16", torch.float32): None,
    ("nf4", 64, True, "bf16", torch.bfloat16): None,
    ("fp8_e4m3", 0, True, "bf16", torch.float32): None,
    ("int4", 64, True, "bf16", torch.float64): None,
}


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_the_kernel_is_chosen_by_leaf_and_rows(case: tuple[Any, ...]) -> None:
    """By grid, group, zero points, scale format and dtype; none for no rows and for many."""
    *how, dtype = case
    e, want = leaf(32, 256, *how), CHOSEN[case]
    assert getattr(kernel(e, dtype, 1), "name", None) == want
    assert kernel(e, dtype, 0) is None and kernel(e, dtype, 257) is None
    if want is not None:
        most = BY_NAME[want].rows(e)
        assert kernel(e, dtype, most) is not None and getattr(kernel(e, dtype, most + 1), "name", None) != want


def test_every_grid_of_even_steps_says_so() -> None:
    """Steps give back the levels; grids without them have no kernel."""
    for name, spec in GRIDS.items():
        assert (spec.steps is not None) == (name in TAKEN["bag"])
        if spec.steps is not None and spec.levels is not None:
            step, least, numbers = spec.steps
            assert [least + step * k for k in numbers] == list(spec.levels)


def uses(e: Expr, x: Tensor) -> list[str]:
    """The kernels that a product runs."""
    ran: list[str] = []

    def note(*args: Any) -> Any:
        found = kernel(*args)
        ran.extend([found.name] if found else [])
        return found

    with mock.patch.object(kernels, "kernel", note):
        e(x)
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_run_the_kernels_of_their_leaves(dtype: torch.dtype) -> None:
    """Sums and products do; what is dense on the way, or cut for one product, does not."""
    x, base, g = torch.ones(2, 64, dtype=dtype), leaf(32, 64), rng("trees")
    want = ["int4pack" if dtype == torch.bfloat16 else "bag"]
    assert uses(base, x) == uses(Sum({"base": base, "adapter:a": lowrank(32, 64, g)}), x) == want
    assert uses(Product(leaf(16, 32), base), x) == 2 * want
    assert not uses(Blocks(leaf(32, 32), 2), x) and not uses(base, torch.ones(300, 64, dtype=dtype))
    assert not uses(Masked(leaf(32, 64), torch.full((32, 8), 255, dtype=torch.uint8), 64), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not uses(base, x) and base(x).dtype == torch.bfloat16


@pytest.mark.parametrize("lead", [(), (2,), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_product(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """Through a kernel, for inputs of any shape, but for rounding each term and the sum."""
    e = leaf(24, 96, "int4", 32, False)
    x = randn(rng("g", lead), *lead, 96).to(dtype).requires_grad_()
    y = e(x)
    assert y.shape == (*lead, 24) and uses(e, x.detach())
    weigh = randn(rng("w", lead), *lead, 24).to(dtype)
    (y * weigh).sum().backward()
    want, size = weigh.double() @ e.dense().double(), weigh.double().abs() @ e.dense().double().abs()
    assert x.grad is not None
    assert bool(((x.grad.double() - want).abs() <= size * (2**-8 if dtype == torch.bfloat16 else 1e-6)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_is_made_once_and_never_copied(dtype: torch.dtype) -> None:
    """The second product uses the first one's layout; forks, deep copies, pickles, state_dict and rebuilds have none."""
    e, x = leaf(32, 64), randn(rng("x"), 2, 64).to(dtype)
    assert not list(e.derived())
    first = e(x)
    made = list(e.derived())
    assert made and torch.equal(e(x), first) and all(a is b for a, b in zip(made, e.derived(), strict=True))
    assert set(e.state_dict()) == {"data"} and e.nbytes() == e.data.numel()
    for other in (fork(e), copy.deepcopy(e), pickle.loads(pickle.dumps(e)), e.rebuild(), e.take(slice(0, 8))):
        assert not list(other.derived())
    assert torch.equal(copy.deepcopy(e)(x), first)
    e.drop_derived()
    assert not list(e.derived())


def change_cast(e: Quantized, new: Quantized) -> None:
    """As `.to(device)` does."""
    e._apply(lambda t: new.data if t.dtype == torch.uint8 else t)


def change_loaded(e: Quantized, new: Quantized) -> None:
    e.load_state_dict(new.state_dict())


def change_assigned(e: Quantized, new: Quantized) -> None:
    e.load_state_dict(new.state_dict(), assign=True)


def change_written(e: Quantized, new: Quantized) -> None:
    e.data.copy_(new.data)


def change_set(e: Quantized, new: Quantized) -> None:
    e.data = new.data


CHANGES = (change_cast, change_loaded, change_assigned, change_written, change_set)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_no_layout_is_stale(change: Any, dtype: torch.dtype) -> None:
    """Whichever way the bytes are replaced, the next product is that of the new ones."""
    e, new, x = (
        leaf(32, 64),
        leaf(32, 64, symmetric=True, group=32, name="int4", scale="bf16"),
        randn(rng("x"), 2, 64).to(dtype),
    )
    new = Quantized.encode(15 - e.codes(), e.scales(), None, grid="int4", group=32)
    before = e(x)
    change(e, new)
    assert torch.equal(e(x), new(x)) and not torch.equal(e(x), before)


def test_a_replaced_call_sees_its_own_bytes() -> None:
    """torch.func.functional_call multiplies with the tensors it is given."""
    e, x = leaf(32, 64), randn(rng("x"), 2, 64)
    before, other = e(x), torch.flip(e.data, [0])
    made = torch.func.functional_call(e, {"data": other}, (x,))
    torch.testing.assert_close(made, before.flip(1))
    assert torch.equal(e(x), before)


def test_a_layout_made_in_inference_mode_serves_training() -> None:
    """And one of a leaf that was itself made there."""
    with torch.inference_mode():
        inner = leaf(32, 64)
    for e in (leaf(32, 64), inner):
        x = randn(rng("x"), 2, 64)
        with torch.inference_mode():
            first = e(x)
        leaf_x = x.clone().requires_grad_()
        e(leaf_x).sum().backward()
        assert torch.equal(e(x), first) and leaf_x.grad is not None


def test_whole_graphs_compile() -> None:
    """torch.compile traces the dense product without a break, forward and backward."""
    e, x = compensated(32, 64, rng("compile")), randn(rng("x"), 2, 64).requires_grad_()
    made = torch.compile(lambda x: e(x), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(made, e(x), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(made.sum(), x)
    torch.testing.assert_close(grad, e.dense().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
