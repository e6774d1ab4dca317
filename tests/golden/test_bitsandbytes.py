"""bitsandbytes' 4-bit weights beside weft's: what is the same, and what is not.

nf4 is the same: levels, and the code of every weight. Scales are float32 there and bfloat16 here, so that one of more than eight
significant bits is rounded (at most by 2^-8 of it). Double quantization is another scheme: there 256 uneven signed levels for the
scales less their mean, under one float32 for 256 of them; here whole numbers of 8 bits under one float32 a row. fp4 is another
grid: its smallest level is 1/32 where that of the OCP's standard is 1/2, and its codes stand in another order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.expr import Quantized
from weft.grid import grid
from weft.linalg.grids import grouped, minmax, nearest

from . import make_bitsandbytes

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "bitsandbytes.npz").items()}
both = pytest.mark.parametrize("which", ["any", "even"])


def codes(at: str) -> Tensor:
    """Codes [4 256]: the high nibble of a byte is the first."""
    data = GOLDEN[f"{at}.data"]
    return torch.stack([data >> 4, data & 15], -1).view(4, 256)


def scales(at: str) -> Tensor:
    """Scales [4 4], those that are quantized read by their levels, their scale and their mean."""
    held = GOLDEN[f"{at}.scales"]
    if f"{at}.offset" in GOLDEN:
        held = GOLDEN[f"{at}.scales.levels"][held.long()] * GOLDEN[f"{at}.scales.scale"] + GOLDEN[f"{at}.offset"]
    return held.view(4, 4)


@both
def test_nf4(which: str) -> None:
    """The same levels, the same codes; the same values where bfloat16 holds the scales, else but for their rounding."""
    at, w = f"nf4.{which}.once", GOLDEN[f"{which}.weight"]
    assert torch.equal(torch.tensor(grid("nf4").levels), GOLDEN[f"{at}.levels"])
    assert torch.equal(scales(at), grouped(w, 64).abs().amax(-1))
    assert torch.equal(grid("nf4").nearest(w / scales(at).repeat_interleave(64, 1)), codes(at))
    ours, theirs = Quantized.encode(codes(at), scales(at), None, grid="nf4", group=64).dense(), GOLDEN[f"{at}.values"]
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=0)
    assert torch.equal(ours, theirs) is (which == "even")


@both
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization(kind: str, which: str) -> None:
    """Their scheme, read by hand, is their values to the last bit; ours of the same weight errs no more than theirs by 2 %."""
    at, w = f"{kind}.{which}.twice", GOLDEN[f"{which}.weight"]
    theirs = GOLDEN[f"{at}.values"]
    assert torch.equal(GOLDEN[f"{at}.levels"][codes(at).long()] * scales(at).repeat_interleave(64, 1), theirs)
    assert len(GOLDEN[f"{at}.scales.levels"]) == 256 and float(GOLDEN[f"{at}.scales.levels"].min()) < 0
    if kind == "nf4":
        fit = minmax(w, "nf4", 64, True, "uint8")
        ours = fit.encode(nearest(w, fit)).dense()
        assert float((ours - w).square().sum()) <= 1.02 * float((theirs - w).square().sum())


def test_fp4() -> None:
    """Of its levels, times 6 as the standard counts, all but the smallest are the standard's."""
    theirs, ours = GOLDEN["fp4.any.once.levels"] * 6, grid("fp4").ascending[0]
    same = {round(float(v), 4) for v in theirs} & {float(v) for v in ours}
    assert {float(v) for v in ours} - same == {-0.5, 0.5}
    assert {round(float(v), 4) for v in theirs} - same == {-0.0312, 0.0312}
    at = "fp4.any.once"
    assert torch.equal(
        GOLDEN[f"{at}.levels"][codes(at).long()] * scales(at).repeat_interleave(64, 1), GOLDEN[f"{at}.values"]
    )


def test_the_package_makes_them_still() -> None:
    """Where bitsandbytes is installed, what it makes now is what is stored."""
    pytest.importorskip("bitsandbytes")
    now = make_bitsandbytes.made()
    assert now.keys() == GOLDEN.keys() and all(np.array_equal(now[k], v.numpy()) for k, v in GOLDEN.items())
