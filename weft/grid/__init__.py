"""Number formats as data: what a code means, and how codes become bytes. Knows no weight and no model."""

from weft.grid.bits import pack, packed_bytes, unpack
from weft.grid.formats import GRIDS, Grid, grid

__all__ = ["GRIDS", "Grid", "grid", "pack", "packed_bytes", "unpack"]
