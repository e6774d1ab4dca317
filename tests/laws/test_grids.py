"""Laws of the number formats and of fitting them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.error import OptionError, ShapeError
from weft.grid import GRIDS, SCALES, bits, grid, scale_format
from weft.linalg.grids import Fitted, grouped, minmax, nearest, search, value

from .cases import PLACES, randn, rng, weight

FORMATS = [(name, s, scale) for name, s in PLACES for scale in SCALES]
"""Every grid with every format of its scales."""


def packing_goes_back(codes: Tensor, width: int) -> None:
    """unpack(pack(codes)) = codes in packed_bytes bytes a row, element i at bits [i b, (i+1) b) of its row."""
    data = bits.pack(codes, width)
    assert data.dtype == torch.uint8
    assert (
        data.shape
        == (len(codes), bits.packed_bytes(codes.shape[1], width))
        == (len(codes), -(-codes.shape[1] * width // 8))
    )
    assert torch.equal(bits.unpack(data, width, codes.shape[1]), codes)
    for row, packed in zip(codes.tolist(), data.tolist(), strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(code << (width * i) for i, code in enumerate(row))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 37), st.data())
def test_packing(width: int, m: int, n: int, data: st.DataObject) -> None:
    """Any codes of any width, rows that do not fill their last byte included."""
    rows = data.draw(st.lists(st.lists(st.integers(0, 2**width - 1), min_size=n, max_size=n), min_size=m, max_size=m))
    packing_goes_back(torch.tensor(rows, dtype=torch.uint8), width)


@pytest.mark.parametrize("width", range(1, 8))
def test_codes_must_fit(width: int) -> None:
    """A code of one bit more is refused rather than cut."""
    with pytest.raises(ShapeError):
        bits.pack(torch.tensor([[0, 2**width]], dtype=torch.uint8), width)


def test_nf4_is_the_table_of_the_paper() -> None:
    """16 ascending values of QLoRA's appendix E with an exact zero and both ends at one."""
    levels = GRIDS["nf4"].levels
    assert levels is not None and len(levels) == 16 and list(levels) == sorted(set(levels))
    assert (levels[0], levels[7], levels[15]) == (-1.0, 0.0, 1.0)
    quarters = [-0.6961928009986877, -0.28444138169288635, 0.07958029955625534, 0.33791524171829224, 0.7229568362236023]
    assert [levels[i] for i in (1, 4, 8, 11, 14)] == quarters


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_found_by_name(name: str) -> None:
    """A grid has its own name, and as many levels as codes; an unknown one lists them."""
    assert grid(name).name == name and len(grid(name).levels or range(2 ** grid(name).bits)) == grid(name).count
    with pytest.raises(OptionError, match=name):
        grid(f"{name}x")


@pytest.mark.parametrize("n", [0, 1, 5, 8])
@pytest.mark.parametrize("name", [name for name, g in GRIDS.items() if g.levels is not None])
def test_packed_codes_are_decoded_to_their_levels(name: str, n: int) -> None:
    """Every code at every place, to the bit."""
    spec = grid(name)
    codes = torch.arange(3 * spec.count * n).view(-1, n).remainder(spec.count) if n else torch.zeros(2, 0)
    want = torch.tensor([[spec.levels[c] for c in row] for row in codes.int().tolist()]).view(len(codes), n)
    made = spec.decode(spec.pack(codes.to(torch.uint8)), n)
    assert torch.equal(made.view(torch.int32), want.view(torch.int32)) and made.is_contiguous()


@pytest.mark.parametrize("name", SCALES)
def test_scale_formats_are_found_by_name(name: str) -> None:
    """As grids are."""
    assert scale_format(name).name == name
    with pytest.raises(OptionError, match=name):
        scale_format(f"{name}x")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(0, 37), st.randoms(use_true_random=False))
def test_ternary_packing(m: int, n: int, chance: random.Random) -> None:
    """Five codes a byte, the first the lowest digit; nothing else fits."""
    spec, codes = grid("ternary"), torch.tensor([[chance.randrange(3) for _ in range(n)] for _ in range(m)])
    data = spec.pack(codes.to(torch.uint8).view(m, n))
    assert data.shape == (m, spec.row_bytes(n)) == (m, -(-n // 5))
    assert torch.equal(spec.unpack(data, n), codes.to(torch.uint8).view(m, n))
    for row, packed in zip(codes.view(m, n).tolist(), data.tolist(), strict=True):
        assert sum(b * 243**k for k, b in enumerate(packed)) == sum(c * 3**k for k, c in enumerate(row))
    with pytest.raises(ShapeError):
        spec.pack(torch.full((1, 4), 3, dtype=torch.uint8))


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_eight_bit_floats_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Every code means the same, and rounding, ties and all, gives the same code but for minus zero."""
    spec, every = grid(name), torch.arange(256, dtype=torch.uint8).view(dtype).float()
    levels = torch.tensor(spec.levels)
    assert torch.equal(levels.nan_to_num(7e7), every.nan_to_num(7e7))
    ascending = spec.ascending[0]
    x = torch.cat(
        [randn(rng(name), 20000) * 2.0 ** randn(rng(name, 2), 20000).mul(8), (ascending[1:] + ascending[:-1]) / 2]
    )
    x = x.clamp(-spec.top, spec.top)
    assert torch.equal(spec.value(spec.nearest(x)), x.to(dtype).float())


SMALL_FLOATS = {
    "fp4": (2, 1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "fp6_e2m3": (2, 3, [0, 0.125, 0.875, 1, 1.875, 7.5]),
    "fp6_e3m2": (3, 2, [0, 0.0625, 0.1875, 0.25, 28]),
}


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_small_floats_are_those_of_the_standard(name: str) -> None:
    """OCP MX 1.0, tables 3 to 5: extremes and some between; sign, exponent and mantissa in the code; ties to even."""
    exponent, mantissa, some = SMALL_FLOATS[name]
    spec = grid(name)
    assert spec.levels is not None and set(some) <= set(spec.levels) and spec.top == some[-1]
    half = len(spec.levels) // 2
    for code, v in enumerate(spec.levels):
        e, f = code % half >> mantissa, code % 2**mantissa
        bias = 2 ** (exponent - 1) - 1
        want = 2.0 ** (e - bias) * (1 + f / 2**mantissa) if e else 2.0 ** (1 - bias) * f / 2**mantissa
        assert v == (-want if code >= half else want)
    ascending, codes = spec.ascending
    ties = spec.nearest((ascending[1:] + ascending[:-1]) / 2)
    assert bool((ties % 2 == 0).all()) and torch.equal(spec.nearest(ascending), codes)


def test_powers_of_two_as_scales() -> None:
    """A byte c means 2^(c - 127), 255 means NaN (OCP MX 1.0, 5.4.1); a scale becomes the nearest in the exponent."""
    form = scale_format("e8m0")
    every = form.decode(torch.arange(256, dtype=torch.uint8)[None])[0]
    assert torch.equal(every[:255].double(), 2.0 ** (torch.arange(255).double() - 127)) and bool(every[255].isnan())
    assert torch.equal(form.encode(every[None], None)[0], torch.arange(256, dtype=torch.uint8))
    assert form.snap(torch.tensor([[1.4, 1.42]]), None).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("name", SCALES)
def test_scales_are_snapped_once(name: str) -> None:
    """What a format holds, it gives back; nothing is further away than its steps; NaN stays NaN."""
    form, s = scale_format(name), (randn(rng("s"), 6, 9) * 0.7).exp()
    divisor = form.divisor(s)
    made = form.snap(s, divisor)
    assert torch.equal(form.snap(made, divisor), made)
    step = {"bf16": 2**-8, "e8m0": 2**0.5 - 1, "e4m3": 2**-4, "uint8": 0.5 / 255}[name]
    reach = s.amax(1, keepdim=True) if name == "uint8" else s
    assert bool(((made - s).abs() <= step * reach * (1 + 1e-5)).all())
    s[0, 0] = torch.nan
    assert bool(form.snap(s, form.divisor(s))[0].isnan().any())


def worth(fit: Fitted, codes: Tensor) -> Tensor:
    """What codes [m n] mean, in float64."""
    n = codes.shape[1]
    zero, scale = (t.double().repeat_interleave(fit.group or n, 1)[:, :n] for t in (fit.zero(), fit.scales))
    return value(codes.double(), zero, fit.name).double() * scale


def minmax_covers(w: Tensor, name: str, group: int, symmetric: bool, scale: str) -> None:
    """Rounding misses no entry by more than half a gap, but for what a scale loses in its format.

    Signs cover nothing: their scale is the one of least squares.
    """
    fit = minmax(w, name, group, symmetric, scale)
    gap = (worth(fit, nearest(w, fit)) - w.double()).abs()
    per_entry = fit.scales.double().repeat_interleave(group or w.shape[1], 1)[:, : w.shape[1]]
    form = scale_format(scale)
    assert torch.equal(fit.scales, form.snap(fit.scales, fit.divisor)) and bool((fit.scales > 0).all())
    if name == "sign":
        if scale == "bf16":
            size = grouped(torch.ones_like(w), group).sum(-1)
            torch.testing.assert_close(fit.scales, grouped(w.abs(), group).sum(-1) / size, rtol=2**-8, atol=0)
        return
    levels = torch.tensor(sorted(v for v in grid(name).levels or range(2 ** grid(name).bits) if math.isfinite(v)))
    half, reach = float(levels.diff().max()) / 2, float(levels.abs().max())
    lost = {"bf16": 2**-8, "e4m3": 2**-4, "uint8": 0.0, "e8m0": 0.0}[scale] * reach
    if scale == "uint8" and fit.divisor is not None:
        lost = (0.5 / fit.divisor.double() / per_entry) * reach
    assert bool((gap <= per_entry * (half + lost) * (1 + 1e-6)).all())


def nearest_is_nearest(w: Tensor, name: str, group: int, symmetric: bool, scale: str) -> None:
    """No code of the grid is nearer than the one chosen."""
    fit = minmax(w, name, group, symmetric, scale)
    made = (worth(fit, nearest(w, fit)) - w.double()).abs()
    numbers = [i for i, v in enumerate(grid(name).levels or range(grid(name).count)) if math.isfinite(v)]
    every = [(worth(fit, torch.full(w.shape, code)) - w.double()).abs() for code in numbers]
    assert bool((made <= torch.stack(every).amin(0) + 1e-6 * w.abs().max()).all())


def search_is_never_worse(w: Tensor, name: str, group: int, symmetric: bool, scale: str) -> None:
    """No group's weighted error is above that of minmax, and with bfloat16 scales the total of up to 4 bits is below it."""
    v = randn(rng("v"), *w.shape).abs()

    def missed(fit: Fitted) -> Tensor:
        return grouped((worth(fit, nearest(w, fit)) - w.double()).square() * v.double(), group).sum(-1)

    plain = missed(minmax(w, name, group, symmetric, scale))
    found = missed(search(w, v, name, group, symmetric, scale=scale))
    assert bool((found <= plain * (1 + 1e-5) + 1e-12).all())
    assert grid(name).bits > 4 or scale != "bf16" or float(found.sum()) < float(plain.sum())


Law = Callable[[Tensor, str, int, bool, str], None]
GRID_LAWS: list[Law] = [minmax_covers, nearest_is_nearest, search_is_never_worse]


@pytest.mark.parametrize(("name", "symmetric", "scale"), FORMATS)
@pytest.mark.parametrize("law", GRID_LAWS, ids=lambda law: law.__name__)
def test_fitting(law: Law, name: str, symmetric: bool, scale: str) -> None:
    """Each law, on every grid, for whole rows and for groups that do not divide them."""
    for group in (0, 7):
        law(weight(6, 24, name), name, group, symmetric, scale)


@pytest.mark.parametrize(("name", "symmetric", "scale"), [f for f in FORMATS if f[0] != "sign"])
def test_zeros_stay_zero(name: str, symmetric: bool, scale: str) -> None:
    """Zero is a level of every grid but that of signs, with every zero point, also in a row of nothing else."""
    w = weight(4, 10, name) * torch.tensor([[1.0], [0.0], [-1.0], [1.0]])
    w[:, ::3] = 0
    w[3] = w[3].abs()
    for fit in (minmax(w, name, 4, symmetric, scale), search(w, torch.zeros_like(w), name, 4, symmetric, scale=scale)):
        assert not bool(worth(fit, nearest(w, fit))[w == 0].any())


@pytest.mark.parametrize(("name", "symmetric", "scale"), FORMATS)
def test_what_was_fitted_is_what_is_stored(name: str, symmetric: bool, scale: str) -> None:
    """The node's value is that of the fit, and another fit under the same divisors keeps them."""
    w = weight(5, 24, name)
    fit = search(w, torch.ones_like(w), name, 7, symmetric, scale=scale)
    node = fit.encode(nearest(w, fit))
    torch.testing.assert_close(node.dense().double(), worth(fit, nearest(w, fit)), rtol=1e-6, atol=0)
    again = minmax(w * 0.9, name, 7, symmetric, scale, like=fit)
    if fit.divisor is not None:
        assert torch.equal(again.encode(nearest(w, again)).divisor(), fit.divisor)
