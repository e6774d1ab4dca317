"""The grids: integers of 2 to 8 bits, and NF4 (QLoRA, 2305.14314, appendix E)."""

from __future__ import annotations

from dataclasses import dataclass

from weft.error import OptionError


@dataclass(frozen=True)
class Grid:
    """The values that a code of `bits` bits can mean, before its group's scale.

    Integer grids have `levels is None`: code q means q - zero, with zero = 2^(bits-1) when symmetric.
    Table grids list their values in ascending order and have no zero point.
    """

    name: str
    bits: int
    levels: tuple[float, ...] | None = None


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

GRIDS: dict[str, Grid] = {g.name: g for g in (*(Grid(f"int{b}", b) for b in range(2, 9)), Grid("nf4", 4, _NF4))}


def grid(name: str) -> Grid:
    """The grid of that name. Errors: OptionError for an unknown one."""
    if name not in GRIDS:
        raise OptionError("unknown grid", where="grid", got=name, want=", ".join(GRIDS), fix="choose one of these")
    return GRIDS[name]
