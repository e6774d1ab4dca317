"""Number formats as data: what a code means, and how codes and scales become bytes. Knows no weight and no model."""

from weft.grid.bits import pack, packed_bytes, unpack
from weft.grid.formats import GRIDS, Grid, grid
from weft.grid.scales import SCALES, ScaleFormat, scale_format

__all__ = ["GRIDS", "SCALES", "Grid", "ScaleFormat", "grid", "pack", "packed_bytes", "scale_format", "unpack"]
