"""GGUF's blocks beside weft's rows: the same codes and scales have the same value, to the last bit.

GGUF stores scales in float16, weft in bfloat16, so that a scale of more than eight significant bits is rounded (at most by
2^-8 of it); all else of Q4_0, Q5_0, Q8_0, TQ1_0 and TQ2_0 is the same, and MXFP4 and NVFP4 are the same wholly. Q4_1 (and
Q5_1) adds an offset of its own: it is weft's only where that is a whole number of scales from 0 to 15, as zero points are. Formats
of scales of scales (Q2_K ... Q6_K) and of uneven levels under a scale (IQ1 ... IQ4) have no counterpart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from weft.expr import Quantized

from . import make_gguf

GOLDEN = dict(np.load(Path(__file__).parent / "gguf.npz"))
HALVES = {"Q4_0", "Q4_1", "Q5_0", "MXFP4"}


def blocks(name: str, which: str, size: int) -> Tensor:
    """The blocks [2 blocks bytes] of a format."""
    raw = torch.from_numpy(GOLDEN[f"{name}.{which}.blocks"])
    return raw.view(2, 256 // size, -1)


def values(name: str, which: str) -> Tensor:
    """What the gguf package reads from them."""
    return torch.from_numpy(GOLDEN[f"{name}.{which}.values"])


def float16(data: Tensor) -> Tensor:
    """Two bytes a number."""
    return data.clone().contiguous().view(torch.float16).float().flatten(1)


def halves(data: Tensor) -> Tensor:
    """Low nibbles of all bytes, then high ones, by ggml's order."""
    return torch.cat([data & 15, data >> 4], -1)


def digits(data: Tensor) -> Tensor:
    """TQ1_0's numbers of five digits to base 3, stored as a fraction of 256; the last bytes hold four."""
    parts = []
    for part, count in ((data[..., :32], 5), (data[..., 32:48], 5), (data[..., 48:], 4)):
        for i in range(count):
            parts.append((part.int() * 3**i % 256) * 3 >> 8)
    return torch.cat(parts, -1)


def read(name: str, which: str) -> tuple[Tensor, Tensor, dict[str, object], Tensor | None]:
    """Codes [2 256], scales [2 g], what weft calls the format, and GGUF's offsets, from the bytes as ggml lays them out."""
    size = 256 if name.startswith("TQ") else 32
    data, offset = blocks(name, which, size), None
    how: dict[str, object] = {"grid": "int4", "group": size}
    if name == "Q4_0":
        scales, codes = data[..., :2], halves(data[..., 2:])
    elif name == "Q4_1":
        scales, codes, offset = data[..., :2], halves(data[..., 4:]), float16(data[..., 2:4])
    elif name == "Q5_0":
        high = torch.stack([data[..., 2 + i // 8] >> (i % 8) & 1 for i in range(32)], -1)
        scales, codes, how["grid"] = data[..., :2], halves(data[..., 6:]) | high << 4, "int5"
    elif name == "Q8_0":
        scales, codes, how["grid"] = data[..., :2], data[..., 2:] ^ 128, "int8"  # two's complement, and 128 added
    elif name == "TQ1_0":
        scales, codes, how["grid"] = data[..., -2:], digits(data[..., :-2]), "ternary"
    else:
        shifts = [data[..., at : at + 32] >> bit & 3 for at in (0, 32) for bit in (0, 2, 4, 6)]
        scales, codes, how["grid"] = data[..., -2:], torch.cat(shifts, -1), "ternary"
    return codes.reshape(2, 256).to(torch.uint8), float16(scales), how, offset


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0"])
def test_whole_numbers(name: str) -> None:
    """Equal where bfloat16 holds the scale; else the scale's rounding is all the difference."""
    for which in ("even", "any"):
        codes, scales, how, _ = read(name, which)
        ours, theirs = Quantized.encode(codes, scales, None, **how), values(name, which)
        assert codes.unique().numel() > 2
        if which == "even":
            assert torch.equal(scales.bfloat16().float(), scales) and torch.equal(ours.dense(), theirs)
        assert torch.equal(ours.dense() == 0, theirs == 0)
        torch.testing.assert_close(ours.dense(), theirs, rtol=2**-8, atol=0)


def test_offsets() -> None:
    """An offset of whole scales is a zero point; any other has none."""
    codes, scales, how, offset = read("Q4_1", "even")
    zeros = -offset / scales
    assert torch.equal(zeros, zeros.round()) and zeros.unique().numel() > 2
    ours = Quantized.encode(codes, scales, zeros.to(torch.uint8), **how)
    assert torch.equal(ours.dense(), values("Q4_1", "even"))
    _, scales, _, offset = read("Q4_1", "any")
    assert bool((-offset / scales != (-offset / scales).round()).all())


def test_mxfp4() -> None:
    """The package halves the power and doubles the levels; the bytes are those of the standard, here and there."""
    data = blocks("MXFP4", "any", 32)
    powers, codes = data[..., 0], halves(data[..., 1:]).reshape(2, 256)
    scales = 2.0 ** (powers.float() - 127)
    ours = Quantized.encode(codes, scales, None, grid="fp4", group=32, scale="e8m0")
    assert torch.equal(ours.data[:, 128:], powers) and torch.equal(ours.dense(), values("MXFP4", "any"))


def test_nvfp4() -> None:
    """Four scales of 8 bits, then their sixteen codes each; there is no divisor: it is 1."""
    data = blocks("NVFP4", "any", 64)
    scales = data[..., :4].clone().view(torch.float8_e4m3fn).float().reshape(2, 16)
    codes = halves(data[..., 4:].reshape(2, 4, 4, 8)).reshape(2, 256)
    ours = Quantized.encode(codes, scales, None, grid="fp4", group=16, scale="e4m3", divisor=torch.ones(2, 1))
    assert torch.equal(ours.data[:, 132:], data[..., :4].reshape(2, 16)) and torch.equal(
        ours.dense(), values("NVFP4", "any")
    )


def test_the_package_makes_them_still() -> None:
    """Where gguf is installed, what it makes now is what is stored."""
    pytest.importorskip("gguf")
    now = make_gguf.made()
    assert now.keys() == GOLDEN.keys() and all(np.array_equal(now[k], v) for k, v in GOLDEN.items())
