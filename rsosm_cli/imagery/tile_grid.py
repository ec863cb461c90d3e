"""Where the tiles of a service lie: the square world of XYZ services, or the tile matrices that a WMTS describes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

MERCATOR = "EPSG:3857"
HALF_WORLD_M = math.pi * 6378137.0  # half the side of the square world of EPSG:3857
_MERCATOR = re.compile(r"(^|[:/])(3857|900913|102100|102113)$")
# A degree of a great circle, as OGC's scale denominators count it (OGC 07-057r7, 6.1).
METRES_PER_DEGREE = 2 * HALF_WORLD_M / 360


@dataclass(frozen=True)
class Matrix:
    """The tiles of one zoom, in units of the CRS. ``tile_px``: pixels a side, None where only a tile can tell."""

    name: str
    left: float
    top: float
    side: float
    columns: int
    rows: int
    tile_px: int | None = None


@dataclass(frozen=True)
class TileGrid:
    """Tile matrices by zoom, the coarsest first, in one CRS; none: the tiling of XYZ services, of every zoom."""

    crs: str = MERCATOR
    matrices: Mapping[int, Matrix] = field(default_factory=dict)

    def matrix(self, zoom: int) -> Matrix:
        if self.matrices:
            return self.matrices[zoom]
        side = 2 * HALF_WORLD_M / (1 << zoom)
        return Matrix(str(zoom), -HALF_WORLD_M, HALF_WORLD_M, side, 1 << zoom, 1 << zoom)

    @property
    def tile_px(self) -> int | None:
        """Pixels a side of a tile, None where the description does not say."""
        return next(iter(self.matrices.values())).tile_px if self.matrices else None

    def ground_px_m(self, zoom: int, tile_px: int, latitude: float) -> float:
        """Return the metres on the ground of a pixel (of its height, where degrees of longitude are shorter)."""
        # EPSG:3857 stretches the ground by 1 / cos(latitude); of other CRS the scale is taken for true.
        stretch = math.cos(math.radians(latitude)) if self.crs == MERCATOR else 1.0
        return self.matrix(zoom).side / tile_px * self._metres * stretch

    @cached_property
    def _metres(self) -> float:
        return metres_per_unit(self.crs)


def known_crs(text: str) -> str | None:
    """Return a CRS as descriptions name it (``urn:ogc:def:crs:EPSG::25832``) in short; None where none is known."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    if _MERCATOR.search(text):
        return MERCATOR
    try:
        parsed = CRS.from_user_input(text)
    except CRSError:
        return None
    authority = parsed.to_authority()
    usable = parsed.is_geographic or parsed.is_projected
    return (":".join(authority) if authority else parsed.to_wkt()) if usable else None


def is_geographic(crs: str) -> bool:
    from pyproj import CRS

    return bool(CRS.from_user_input(crs).is_geographic)


def metres_per_unit(crs: str) -> float:
    """Return the metres of a unit of a CRS; of degrees, those along a great circle."""
    from pyproj import CRS

    parsed = CRS.from_user_input(crs)
    if parsed.is_geographic:
        return METRES_PER_DEGREE
    return float(parsed.axis_info[0].unit_conversion_factor or 1.0)


def northing_first(crs: str) -> bool:
    """Return whether coordinates of a CRS are written north (or latitude) before east, by its definition."""
    from pyproj import CRS

    return CRS.from_user_input(crs).axis_info[0].direction.lower() in ("north", "south")


def area_of_use(crs: str) -> tuple[float, float, float, float] | None:
    """Return west, south, east, north of the ground that a CRS is meant for, in its own units, east before north."""
    from pyproj import CRS, Transformer

    parsed = CRS.from_user_input(crs)
    if parsed.area_of_use is None:
        return None
    box: tuple[float, float, float, float] = Transformer.from_crs("EPSG:4326", parsed, always_xy=True).transform_bounds(
        *parsed.area_of_use.bounds, densify_pts=21
    )
    return box if all(map(math.isfinite, box)) else None
