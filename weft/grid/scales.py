"""How the scales of groups are stored: two bytes each, or one byte each, alone or under a float32 divisor of their row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from weft.error import OptionError
from weft.grid.formats import grid


@dataclass(frozen=True)
class ScaleFormat:
    """`width` bytes a group. With a `top`, a row holds a float32 divisor before them, and scale = code's value / divisor."""

    name: str
    width: int
    top: float = 0.0

    def row_bytes(self, groups: int) -> int:
        """Bytes of a row's scales, divisor and all."""
        return groups * self.width + (4 if self.top else 0)

    def divisor(self, scales: Float[Tensor, "m g"]) -> Float[Tensor, "m 1"] | None:
        """The divisor under which a row's largest scale has the largest code; None in formats without one."""
        if not self.top:
            return None
        most = scales.amax(1, keepdim=True) if scales.shape[1] else scales.new_ones(len(scales), 1)
        return torch.where(most == 0, torch.ones_like(most), self.top / most).float()  # NaN stays, so that it is seen

    def encode(self, scales: Float[Tensor, "m g"], divisor: Float[Tensor, "m 1"] | None) -> UInt8[Tensor, "m bytes"]:
        """The nearest positive scales of the format, as bytes."""
        if self.name == "bf16":
            return scales.to(torch.bfloat16).contiguous().view(torch.uint8)
        if divisor is None:
            return (scales.log2().round().clamp(-127, 127) + 127).nan_to_num(255).to(torch.uint8)
        codes = scales * divisor
        if self.name == "uint8":
            made = codes.round().clamp(1, self.top).to(torch.uint8)
        else:
            made = grid("fp8_e4m3").nearest(codes.clamp(2**-9, self.top))
        return torch.cat([divisor.float().contiguous().view(torch.uint8), made], 1)

    def decode(self, data: UInt8[Tensor, "m bytes"]) -> Float[Tensor, "m g"]:
        """The scales as float32."""
        if self.name == "bf16":
            return data.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
        divisor = self.read_divisor(data)
        if divisor is None:
            bits = data.int() << 23  # a float32's exponent, but at both ends: 2^-127 is subnormal, 255 is NaN
            return bits.masked_fill(data == 0, 1 << 22).masked_fill(data == 255, 0x7FC00000).view(torch.float32)
        codes = data[:, 4:]
        return (codes.float() if self.name == "uint8" else grid("fp8_e4m3").value(codes)) / divisor

    def read_divisor(self, data: UInt8[Tensor, "m bytes"]) -> Float[Tensor, "m 1"] | None:
        """The divisor of each row."""
        return data[:, :4].clone(memory_format=torch.contiguous_format).view(torch.float32) if self.top else None

    def snap(self, scales: Float[Tensor, "m g"], divisor: Float[Tensor, "m 1"] | None) -> Float[Tensor, "m g"]:
        """The nearest scales that the format holds."""
        if self.name == "bf16":
            return scales.to(torch.bfloat16).float()
        return self.decode(self.encode(scales, divisor))


SCALES: dict[str, ScaleFormat] = {
    s.name: s
    for s in (
        ScaleFormat("bf16", 2),
        ScaleFormat("e8m0", 1),
        ScaleFormat("e4m3", 1, 448.0),
        ScaleFormat("uint8", 1, 255.0),
    )
}


def scale_format(name: str) -> ScaleFormat:
    """The scale format of that name. Errors: OptionError for an unknown one."""
    if name not in SCALES:
        want = ", ".join(SCALES)
        raise OptionError("unknown scale format", where="scale", got=name, want=want, fix="choose one of these")
    return SCALES[name]
