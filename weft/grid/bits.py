"""Dense bit packing: element i of a row occupies bits [i*b, (i+1)*b) of that row, lowest bit first."""

from __future__ import annotations

import functools

import torch
from jaxtyping import UInt8
from torch import Tensor

from weft.error import ShapeError


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that one row of `n` codes of `bits` bits takes."""
    return (n * bits + 7) // 8


def pack(codes: UInt8[Tensor, "m n"], bits: int) -> UInt8[Tensor, "m bytes"]:
    """Pack codes in [0, 2^bits) row by row; the last byte of a row is padded with zeros.

    Eight codes make `bits` bytes, so one 64-bit word holds them on the way. Errors: ShapeError if a code does not fit.
    """
    if bits == 8:
        return codes.contiguous()
    if codes.numel() and int(codes.max()) >> bits:
        raise ShapeError(
            "a code does not fit its bits",
            where="grid.pack",
            got=int(codes.max()),
            want=f"below {1 << bits}",
            fix="clamp the codes",
        )
    m, n = codes.shape
    if 8 % bits == 0:
        per = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, -n % per)).view(m, -1, per)  # [m bytes per]
        out = padded[..., 0].clone()
        for i in range(1, per):
            out |= padded[..., i] << (bits * i)
        return out
    padded = torch.nn.functional.pad(codes, (0, -n % 8)).view(m, -1, 8)  # [m words 8]
    word = padded[..., 0].long()
    for i in range(1, 8):
        word |= padded[..., i].long() << (bits * i)
    out = torch.stack([(word >> (8 * k)).to(torch.uint8) for k in range(bits)], -1)  # [m words bits]
    return out.flatten(1)[:, : packed_bytes(n, bits)].contiguous()


def unpack(data: UInt8[Tensor, "m bytes"], bits: int, n: int) -> UInt8[Tensor, "m n"]:
    """Inverse of `pack` for rows of `n` codes."""
    if bits == 8:
        return data[:, :n]
    m, mask = data.shape[0], (1 << bits) - 1
    if 8 % bits == 0:
        return digits(data, 1 << bits, 8 // bits, n)
    words = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).view(m, -1, bits)  # [m words bits]
    word = words[..., 0].long()
    for k in range(1, bits):
        word |= words[..., k].long() << (8 * k)
    out = torch.stack([((word >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], -1)  # [m words 8]
    return out.flatten(1)[:, :n]


def digits(data: UInt8[Tensor, "m bytes"], base: int, per: int, n: int) -> UInt8[Tensor, "m n"]:
    """The `per` lowest digits of every byte to this base, lowest first, as rows of `n`. All of a byte in one look-up."""
    words = _words(base, per).to(data.device)
    out = words.index_select(0, data.int().view(-1)).view(torch.uint8).view(*data.shape, words.element_size())
    return out[..., :per].flatten(1)[:, :n]


@functools.cache
def _words(base: int, per: int) -> Tensor:
    """For every byte a word that holds its digits in its own bytes."""
    bytes_, word = next((k, t) for k, t in _WORDS.items() if k >= per)
    out = torch.zeros(256, bytes_, dtype=torch.uint8)
    for i in range(per):
        out[:, i] = torch.arange(256) // base**i % base
    return out.view(word).view(-1)


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
