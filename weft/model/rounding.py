"""Rounding of activations: the grids of weights, laid on tokens as they come."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from weft.error import NumericError, OptionError, ShapeError
from weft.grid import grid, scale_format
from weft.linalg.grids import Fitted, minmax, nearest, rounded

PER = ("token", "tensor", "static")


class Rounding(nn.Module):
    """Activations put on a symmetric grid as a weight is by round-to-nearest, each token a row of it.

    per token: one scale for every `group` columns of a token (0: all), from its largest entry, in the format `scale`.
    per tensor: one scale for all that is read at once. static: one scale for good, whose two bytes are `data` (empty
    otherwise). Computed in float32, returned in the input's dtype, without a gradient: a tap sees to that.
    """

    data: UInt8[Tensor, "bytes"]

    def __init__(
        self, grid: str, per: str = "token", group: int = 0, scale: str = "bf16", data: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid, self.per, self.group, self.scale = grid, per, group, scale
        self.register_buffer("data", torch.empty(0, dtype=torch.uint8) if data is None else data)
        self._check()

    @classmethod
    def static(cls, grid_name: str, reach: float) -> Rounding:
        """One scale for good, under which `reach` is the largest entry; the scale is in bfloat16."""
        fit = minmax(torch.tensor([[reach]]), grid_name, 0, True)
        return cls(grid_name, "static", data=scale_format("bf16").encode(fit.scales, None)[0])

    def _check(self) -> None:
        """Errors: OptionError for unknown names; ShapeError for what does not go together; NumericError for a scale."""
        said: list[Any] = [self.grid, self.per, self.scale]
        if not all(isinstance(word, str) for word in said) or type(self.group) is not int or self.group < 0:
            got = f"{self.grid!r}, {self.per!r}, {self.group!r}, {self.scale!r}"
            want = "names, and a whole number of columns"
            raise ShapeError("this is no rounding", where="Rounding", got=got, want=want, fix="write it anew")
        grid(self.grid)
        scale_format(self.scale)
        if self.per not in PER:
            got, want = self.per, ", ".join(PER)
            raise OptionError(
                "unknown granularity", where="Rounding.per", got=got, want=want, fix="choose one of these"
            )
        if self.per != "token" and (self.group or self.scale != "bf16"):
            got, want = f"group {self.group}, {self.scale} scales, per {self.per}", "one bf16 scale, group 0"
            fix = "round per token, or leave group and scale alone"
            raise ShapeError("groups are of a token's columns", where="Rounding.group", got=got, want=want, fix=fix)
        size = 2 * (self.per == "static")
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != (size,):
            got = f"{str(self.data.dtype).removeprefix('torch.')}{list(self.data.shape)}"
            raise ShapeError(
                "Rounding.data does not fit", where="data", got=got, want=f"uint8[{size}]", fix="copy it again"
            )
        if size and not 0 < (value := float(self._static())) < torch.inf:
            raise NumericError(
                "a scale is none", where="data", got=value, want="a finite scale above 0", fix="measure again"
            )

    def _static(self) -> Float[Tensor, "1 1"]:
        return scale_format("bf16").decode(self.data[None])

    def rows(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "t k"]:
        """What has scales of its own, a row each: tokens, or all of x."""
        return x.detach().reshape(-1, x.shape[-1]) if self.per == "token" else x.detach().reshape(1, -1)

    def fit(self, rows: Float[Tensor, "t k"]) -> Fitted:
        """The grid as it lies on these rows."""
        if self.per == "static":
            return Fitted(self.grid, 0, self._static(), None)
        group = self.group if self.group < rows.shape[1] else 0  # a group that is wider is all of the row
        return minmax(rows, self.grid, group, True, self.scale)

    def forward(self, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        if not x.numel():
            return x
        rows = self.rows(x)
        return rounded(rows, self.fit(rows)).view(x.shape).to(x.dtype)

    @property
    def integers(self) -> bool:
        """Whether a token is whole numbers of at most 8 bits under one scale."""
        return grid(self.grid).levels is None and not self.group

    def codes(self, x: Float[Tensor, "*b n"]) -> tuple[Int8[Tensor, "t n"], Float[Tensor, "#t 1"]]:
        """Whole numbers and scales whose products are the rounded tokens, where `integers`."""
        rows = self.rows(x)
        fit = self.fit(rows)
        zero = 2 ** (grid(self.grid).bits - 1)
        return (nearest(rows, fit).view(-1, x.shape[-1]).short() - zero).to(torch.int8), fit.scales

    def describe(self) -> str:
        """Such as `int8[token]` or `fp4[token, g32, e8m0 scales]`."""
        about = [self.per] + [f"g{self.group}"] * bool(self.group)
        return f"{self.grid}[{', '.join(about + [f'{self.scale} scales'] * (self.scale != 'bf16'))}]"

    def extra_repr(self) -> str:
        return self.describe()
