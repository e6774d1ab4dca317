"""Laws of the number formats and of fitting them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.error import OptionError, ShapeError
from weft.grid import GRIDS, bits, grid
from weft.linalg.grids import Fitted, grouped, minmax, nearest, search, value

from .cases import randn, rng, weight

PLACES = [(name, s) for name, spec in GRIDS.items() for s in (True, False) if s or spec.levels is None]
"""Every grid, and every integer grid also with zero points."""


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
    assert grid(name).name == name and len(grid(name).levels or range(2 ** grid(name).bits)) == 2 ** grid(name).bits
    with pytest.raises(OptionError, match=name):
        grid(f"{name}x")


def worth(fit: Fitted, codes: Tensor) -> Tensor:
    """What codes [m n] mean, in float64."""
    n = codes.shape[1]
    zero, scale = (t.double().repeat_interleave(fit.group or n, 1)[:, :n] for t in (fit.zero(), fit.scales))
    return value(codes.double(), zero, fit.name).double() * scale


def minmax_covers(w: Tensor, name: str, group: int, symmetric: bool) -> None:
    """Rounding misses no entry by more than half a gap, but for what a scale loses in bfloat16."""
    fit = minmax(w, name, group, symmetric)
    levels = torch.tensor(grid(name).levels or range(2 ** grid(name).bits))
    half, reach = float(levels.diff().max()) / 2, float(levels.abs().max())
    gap = (worth(fit, nearest(w, fit)) - w.double()).abs()
    limit = fit.scales.double().repeat_interleave(group or w.shape[1], 1)[:, : w.shape[1]] * (half + reach * 2**-8)
    assert bool((gap <= limit).all())
    assert torch.equal(fit.scales, fit.scales.bfloat16().float()) and bool((fit.scales > 0).all())


def nearest_is_nearest(w: Tensor, name: str, group: int, symmetric: bool) -> None:
    """No code of the grid is nearer than the one chosen."""
    fit = minmax(w, name, group, symmetric)
    made = (worth(fit, nearest(w, fit)) - w.double()).abs()
    every = [(worth(fit, torch.full(w.shape, code)) - w.double()).abs() for code in range(2 ** grid(name).bits)]
    assert bool((made <= torch.stack(every).amin(0) + 1e-6 * w.abs().max()).all())


def search_is_never_worse(w: Tensor, name: str, group: int, symmetric: bool) -> None:
    """No group's weighted error is above that of minmax, and up to 4 bits the total is below it."""
    v = randn(rng("v"), *w.shape).abs()

    def missed(fit: Fitted) -> Tensor:
        return grouped((worth(fit, nearest(w, fit)) - w.double()).square() * v.double(), group).sum(-1)

    plain, found = missed(minmax(w, name, group, symmetric)), missed(search(w, v, name, group, symmetric))
    assert bool((found <= plain * (1 + 1e-5) + 1e-12).all())
    assert grid(name).bits > 4 or float(found.sum()) < float(plain.sum())


GRID_LAWS: list[Callable[[Tensor, str, int, bool], None]] = [minmax_covers, nearest_is_nearest, search_is_never_worse]


@pytest.mark.parametrize(("name", "symmetric"), PLACES)
@pytest.mark.parametrize("law", GRID_LAWS, ids=lambda law: law.__name__)
def test_fitting(law: Callable[[Tensor, str, int, bool], None], name: str, symmetric: bool) -> None:
    """Each law, on every grid, for whole rows and for groups that do not divide them."""
    for group in (0, 7):
        law(weight(6, 24, name), name, group, symmetric)


@pytest.mark.parametrize(("name", "symmetric"), PLACES)
def test_zeros_stay_zero(name: str, symmetric: bool) -> None:
    """Zero is a level of every grid, with every zero point, also in a row of nothing else."""
    w = weight(4, 10, name) * torch.tensor([[1.0], [0.0], [-1.0], [1.0]])
    w[:, ::3] = 0
    w[3] = w[3].abs()
    for fit in (minmax(w, name, 4, symmetric), search(w, torch.zeros_like(w), name, 4, symmetric)):
        assert not bool(worth(fit, nearest(w, fit))[w == 0].any())
