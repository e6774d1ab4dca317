"""The number formats beside those of compressed-tensors: its codes and scales mean the same here, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp6.base import MXFP6PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.fp6_utils import cast_to_fp6
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales
from torch import Tensor

from weft.expr import Quantized
from weft.grid import grid, unpack
from weft.linalg.grids import grouped, minmax, nearest


def weight() -> Tensor:
    """Heavy-tailed, with groups of very different size."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(24, 128, generator=rng) * torch.randn(24, 1, generator=rng).exp()
    return w * torch.randn(1, 4, generator=rng).mul(2).exp().repeat_interleave(32, 1)


@pytest.mark.parametrize(("name", "cast"), [("fp4", cast_to_fp4), ("fp6_e2m3", cast_to_fp6)])
def test_rounding(name: str, cast: Any) -> None:
    """Every level, every middle between two, and what lies beyond the ends."""
    spec = grid(name)
    levels = spec.ascending[0]
    x = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, torch.linspace(-2 * spec.top, 2 * spec.top, 4001)])
    assert torch.equal(spec.value(spec.nearest(x)), cast(x.clone()))


def args(**more: Any) -> QuantizationArgs:
    """Its description of a format."""
    return QuantizationArgs(type="float", symmetric=True, **more)


def test_nvfp4() -> None:
    """Nibbles, 8-bit float scales and the tensor's scale, as packed there, have the same value here."""
    w = weight()
    how = args(num_bits=4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)
    whole = generate_gparam(w.amin(), w.amax())
    parts = grouped(w, 16)
    scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), how, whole)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    held = {"weight": w, "weight_scale": scale, "weight_global_scale": whole}
    packed = NVFP4PackedCompressor.compress(held, scheme)
    codes = unpack(packed["weight_packed"], 4, 128)
    theirs = dequantize(grid("fp4").value(codes), packed["weight_scale"].float(), args=how, global_scale=whole)
    low = NVFP4PackedCompressor.decompress(dict(packed), scheme)["weight"].float()  # computed in bfloat16
    torch.testing.assert_close(low, theirs, rtol=2**-7, atol=0)
    scales = packed["weight_scale"].float() / whole
    ours = Quantized.encode(codes, scales, None, grid="fp4", group=16, scale="e4m3", divisor=whole.expand(24, 1))
    assert torch.equal(ours.dense(), theirs)
    assert torch.equal(ours.divisor(), whole.expand(24, 1))
    mine = minmax(w, "fp4", 16, True, "e4m3", like=minmax(w, "fp4", 16, True, "e4m3"))
    gap = (mine.encode(nearest(w, mine)).dense() - w).square().sum()
    assert (
        float(gap) <= float((theirs - w).square().sum()) * 1.02
    )  # a divisor for every row is no worse than one for all


@pytest.mark.parametrize(("name", "bits"), [("fp4", 4), ("fp6_e2m3", 6)])
def test_powers_of_two(name: str, bits: int) -> None:
    """The scale of a group is the same, and so is what its entries become."""
    w = weight()
    theirs = 2.0 ** (generate_mx_scales(grouped(w, 32).abs().amax(-1), bits) - 127)
    fit = minmax(w, name, 32, True, "e8m0")
    assert torch.equal(fit.scales, theirs)
    how = args(num_bits=bits, strategy="group", group_size=32, scale_dtype=torch.uint8)
    rounded = dequantize(quantize(w, theirs, None, how), theirs, args=how)
    assert torch.equal(fit.encode(nearest(w, fit)).dense(), rounded)


def test_mxfp6_bytes() -> None:
    """Codes of six bits, packed as there."""
    codes = torch.randint(0, 64, (5, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    values = grid("fp6_e2m3").value(codes)
    how = args(num_bits=6, strategy="group", group_size=32, scale_dtype=torch.uint8)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    packed = MXFP6PackedCompressor.compress({"weight": values, "weight_scale": torch.ones(5, 1)}, scheme)
    theirs = unpack(packed["weight_packed"].view(torch.uint8), 6, 32)
    assert torch.equal(grid("fp6_e2m3").value(theirs), values)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32)])
def test_fp8(bits: int, group: int) -> None:
    """One scale a row, and powers of two for every 32: the codes are torch's own bytes."""
    w = weight()
    fit = minmax(w, "fp8_e4m3", group, True, "e8m0" if group else "bf16")
    how = args(num_bits=bits, strategy="group" if group else "channel", group_size=group or None)
    rounded = quantize(w, fit.scales, None, how, dtype=torch.float8_e4m3fn)
    assert torch.equal(grid("fp8_e4m3").value(nearest(w, fit)), rounded.float())
    assert torch.equal(fit.encode(nearest(w, fit)).dense(), dequantize(rounded, fit.scales, args=how))
