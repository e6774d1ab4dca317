"""Products of int8 codes: exact sums, and what the rounded floats give up to the rounding of floats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.expr import Dense, Expr, Hadamard, LowRank, Masked, Product, Quantized, Sum
from weft.linalg.grids import minmax, nearest
from weft.model import Rounding, Tap, integers, set_expressions, set_taps, weave
from weft.model.integers import integer_product, padded, tapped

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 8, 16), (17, 30, 100), (4, 129, 33), (64, 3, 255)]
"""Tokens, rows and columns: one token, odd sizes, one of everything."""


def weight(
    m: int, n: int, grid: str = "int8", group: int = 0, symmetric: bool = True, scale: str = "bf16"
) -> Quantized:
    """A quantized weight of random rows."""
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(m + n)) / n**0.5
    fit = minmax(w, grid, group, symmetric, scale)
    return fit.encode(nearest(w, fit))


def tokens(t: int, n: int) -> Tensor:
    """Inputs [t n]."""
    x = torch.randn(t, n, generator=torch.Generator().manual_seed(t * n))
    return x * torch.randn(t, 1, generator=torch.Generator().manual_seed(t)).exp()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes every integer product."""
    made: list[int] = []
    plain = integers.integer_product
    monkeypatch.setattr(integers, "integer_product", lambda x, w: made.append(len(x)) or plain(x, w))
    return made


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("size", [*SHAPES, (2, 3, 5000)])
def test_sums_are_exact(size: tuple[int, int, int], kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the largest codes, and of as many of them as float32 cannot hold; by kernels and without."""
    monkeypatch.setattr(integers, "has_kernel", lambda _: kernel)
    t, m, n = size
    rng = torch.Generator().manual_seed(n)
    x, w = (torch.randint(-128, 128, (k, n), generator=rng).to(torch.int8) for k in (t, m))
    x[0], w[0] = -128, -128
    made = integer_product(x, w)
    assert made.dtype == torch.int32 and torch.equal(made.long(), x.long() @ w.long().T)
    assert integers.SHORT * 2**14 == 2**24


@pytest.mark.parametrize("size", SHAPES)
def test_zeros_change_no_sum(size: tuple[int, int, int]) -> None:
    """What is filled up for a kernel with larger units has its sizes and the same sums."""
    t, m, n = size
    x, w = (torch.randint(-128, 128, (k, n)).to(torch.int8) for k in (t, m))
    a, b = padded(x, w)
    assert len(a) > 16 and not (len(a) % 8 or a.shape[1] % 8 or len(b) % 8) and a.shape[1] == b.shape[1]
    assert a.numel() <= (t + 24) * (n + 7) and torch.equal(integer_product(a, b)[:t, :m], integer_product(x, w))


@pytest.mark.parametrize(
    "rounding", [Rounding("int8"), Rounding("int8", "tensor"), Rounding.static("int8", 2.0), Rounding("int4")]
)
@pytest.mark.parametrize("grid", ["int8", "int4", "int3"])
@pytest.mark.parametrize("size", SHAPES)
def test_the_product_is_that_of_the_rounded_floats(
    size: tuple[int, int, int], grid: str, rounding: Rounding, calls: list[int]
) -> None:
    """Beside float64, to what float32 keeps of so many terms; with a turn and without."""
    t, m, n = size
    x, w = tokens(t, n), weight(m, n, grid)
    for turn in ((), (Hadamard.of(torch.randn(n).sign()),)):
        tap = Tap(turn, rounding)
        made, want = tapped(w, tap, x), tap(x).double() @ w.dense().double().T
        floor = tap(x).double().abs() @ w.dense().double().abs().T
        assert made.dtype == x.dtype and bool(((made - want).abs() <= 1e-6 * floor + 1e-30).all())
    assert len(calls) == 2


@pytest.mark.parametrize("scale", ["e8m0", "uint8", "e4m3"])
def test_scales_of_every_format_multiply(scale: str, calls: list[int]) -> None:
    """Of tokens and of rows."""
    x, w, tap = tokens(5, 24), weight(7, 24, scale=scale), Tap((), Rounding("int8", "token", 0, scale))
    torch.testing.assert_close(tapped(w, tap, x), tap(x) @ w.dense().T, rtol=1e-5, atol=1e-5)
    assert calls


def test_other_terms_read_the_rounded_floats(calls: list[int]) -> None:
    """And their gradients, and that of the input, are those of the float product."""
    x, base, tap, weigh = tokens(5, 24), weight(7, 24), Tap((), Rounding("int8")), torch.randn(5, 7)
    pair = LowRank(nn.Parameter(torch.randn(7, 2)), nn.Parameter(torch.randn(2, 24)))
    expr = Sum({"base": base, "adapter:a": pair})
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = tapped(expr, tap, mine)
    (y * weigh).sum().backward()
    got = [mine.grad, pair.b.grad, pair.a.grad]
    pair.zero_grad()
    want = tap(theirs) @ expr.dense().T
    (want * weigh).sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, [theirs.grad, pair.b.grad, pair.a.grad], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls


OTHERS: dict[str, tuple[Expr, Rounding | None]] = {
    "groups": (weight(7, 24, group=8), Rounding("int8")),
    "zero points": (weight(7, 24, symmetric=False), Rounding("int8")),
    "a table": (weight(7, 24, "nf4"), Rounding("int8")),
    "plain": (Dense(torch.randn(7, 24)), Rounding("int8")),
    "a product": (Product(weight(7, 24), Hadamard.of(torch.ones(24))), Rounding("int8")),
    "zeros": (Masked.of(torch.randn(7, 24), torch.ones(7, 24).bool()).rebuild(kept=weight(7, 24)), Rounding("int8")),
    "groups of a token": (weight(7, 24), Rounding("int8", "token", 8)),
    "float tokens": (weight(7, 24), Rounding("fp8_e4m3")),
    "turned tokens": (weight(7, 24), None),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_integer_product_is_simulated(case: str, calls: list[int]) -> None:
    """Whatever the weight or the tap: the product with the tapped floats."""
    expr, rounding = OTHERS[case]
    x, tap = tokens(5, 24), Tap((Hadamard.of(torch.ones(24)),), rounding)
    assert torch.equal(tapped(expr, tap, x), expr(tap(x))) and not calls


def test_rows_too_long_for_int32_are_simulated(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """The limit is where the largest sums leave int32."""
    assert (integers.LONGEST - 1) * 2**14 < 2**31 <= integers.LONGEST * 2**14
    monkeypatch.setattr(integers, "LONGEST", 24)
    x, tap = tokens(5, 24), Tap((), Rounding("int8"))
    assert torch.equal(tapped(weight(7, 24), tap, x), weight(7, 24)(tap(x))) and not calls


def test_large_weights_multiply_in_slices(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    """At most CHUNK codes are unpacked at a time, and the result is the same."""
    x, w, tap = tokens(5, 24), weight(7, 24), Tap((), Rounding("int8"))
    want = tapped(w, tap, x)
    monkeypatch.setattr("weft.expr.base.CHUNK", 2 * 24)
    assert torch.equal(tapped(w, tap, x), want) and len(calls) == 1 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_keep_dtype_shape_and_bias(dtype: torch.dtype, calls: list[int]) -> None:
    """As without a tap; no token at all is one case of it."""
    model: Any = weave(nn.Sequential(nn.Linear(24, 7)).to(dtype))
    set_expressions(model, {"0.weight": weight(7, 24)})
    set_taps(model, {"0.weight": Tap((), Rounding("int8"))})
    x = tokens(6, 24).to(dtype).view(2, 3, 24)
    want = model[0].tap(x).float() @ weight(7, 24).dense().T + model[0].bias.float()
    assert model(x).dtype == dtype and model(x[:0]).shape == (0, 3, 7)
    torch.testing.assert_close(model(x).float(), want, rtol=0.02, atol=0.02)
    assert calls
