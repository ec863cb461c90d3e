"""The only language for "where": projections, integer pixel bounds, and the grid of tiles.

Pixels are counted from the origin of the CRS: pixel (col, row) of a projection covers
``x = col * gsd_m``, ``y = -row * gsd_m`` (rows grow southwards). Two cities of one UTM zone and one GSD therefore
share one lattice, and a tile is four integers, not four rounded floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError

if TYPE_CHECKING:
    from affine import Affine
    from shapely import Geometry

WGS84 = "EPSG:4326"


@dataclass(frozen=True)
class Projection:
    """A projected CRS with square pixels of ``gsd_m`` metres."""

    crs: str
    gsd_m: float

    def bounds_of(self, bounds_px: PixelBounds) -> tuple[float, float, float, float]:
        """Return (west, south, east, north) of pixel bounds, in metres of the CRS."""
        g = self.gsd_m
        return (bounds_px.col_min * g, -bounds_px.row_max * g, bounds_px.col_max * g, -bounds_px.row_min * g)

    def transform_of(self, bounds_px: PixelBounds) -> Affine:
        """Return the affine transform of a raster whose upper left pixel is that of ``bounds_px``."""
        from affine import Affine

        g = self.gsd_m
        return Affine(g, 0.0, bounds_px.col_min * g, 0.0, -g, -bounds_px.row_min * g)

    def pixels_around(self, west: float, south: float, east: float, north: float) -> PixelBounds:
        """Return the smallest pixel bounds that contain a box given in metres of the CRS."""
        g = self.gsd_m
        return PixelBounds(math.floor(west / g), math.floor(-north / g), math.ceil(east / g), math.ceil(-south / g))


@dataclass(frozen=True, order=True)
class PixelBounds:
    """Half-open box of integer pixels on the lattice of a :class:`Projection`."""

    col_min: int
    row_min: int
    col_max: int
    row_max: int

    @property
    def width(self) -> int:
        return self.col_max - self.col_min

    @property
    def height(self) -> int:
        return self.row_max - self.row_min

    @property
    def empty(self) -> bool:
        return self.width <= 0 or self.height <= 0

    def intersection(self, other: PixelBounds) -> PixelBounds:
        return PixelBounds(
            max(self.col_min, other.col_min),
            max(self.row_min, other.row_min),
            min(self.col_max, other.col_max),
            min(self.row_max, other.row_max),
        )

    def padded(self, pixels: int) -> PixelBounds:
        return PixelBounds(self.col_min - pixels, self.row_min - pixels, self.col_max + pixels, self.row_max + pixels)


@dataclass(frozen=True)
class Grid:
    """The tiles of a place: cells (column, row) of a lattice with step ``stride_px``.

    ``cells``: (N, 2) int64 in reading order (row by row from the north, west to east). Cell (c, r) covers pixels
    ``c * stride_px .. c * stride_px + tile_px`` and the same in rows.
    """

    projection: Projection
    tile_px: int
    stride_px: int
    cells: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cells)

    def bounds_px(self) -> NDArray[np.int64]:
        """Return (N, 4) integer pixel bounds: col_min, row_min, col_max, row_max."""
        start = self.cells * self.stride_px
        return np.concatenate([start, start + self.tile_px], axis=1)

    def bounds_m(self) -> NDArray[np.float64]:
        """Return (N, 4) float64 bounds in metres of the CRS: west, south, east, north."""
        px = self.bounds_px()
        metres = np.stack([px[:, 0], -px[:, 3], px[:, 2], -px[:, 1]], axis=1) * self.projection.gsd_m
        return metres.astype(np.float64)

    @classmethod
    def covering(cls, place: Geometry, *, tile_px: int, stride_px: int, gsd_m: float) -> Grid:
        """Return the tiles that share area with ``place`` (WGS 84), in the UTM zone of its centroid."""
        import shapely

        crs = utm_crs(place)
        local = reproject(np.array([place], dtype=object), WGS84, crs)[0]
        step = stride_px * gsd_m
        west, south, east, north = shapely.bounds(local)
        # A tile wider than its stride reaches the place from cells before the first one.
        reach = math.ceil(tile_px / stride_px) - 1
        cols = np.arange(math.floor(west / step) - reach, math.ceil(east / step))
        rows = np.arange(math.floor(-north / step) - reach, math.ceil(-south / step))
        shapely.prepare(local)
        kept = []
        for row in rows:  # a row at a time: a country's box has millions of cells, its rows only thousands
            x, y, size = cols * step, -row * step, tile_px * gsd_m
            boxes = shapely.box(x, y - size, x + size, y)
            inside = shapely.intersects(local, boxes) & ~shapely.touches(local, boxes)
            kept.append(np.stack([cols[inside], np.full(inside.sum(), row)], axis=1))
        cells = np.concatenate(kept).astype(np.int64) if kept else np.empty((0, 2), np.int64)
        return cls(Projection(crs, gsd_m), tile_px, stride_px, cells)


def utm_crs(place: Geometry) -> str:
    """Return the EPSG code of the UTM zone of the centroid of ``place`` (WGS 84).

    One zone serves the whole place even where it crosses zones. The exceptions of Norway and Svalbard are left
    out on purpose: they are a convention of map sheets, and a plain rule is easier to reproduce.
    """
    centre = place.centroid
    if not -80 <= centre.y <= 84:
        raise UsageError(
            f"The place lies at latitude {centre.y:.1f}, outside the UTM zones (80° S to 84° N).",
            hint="Choose a place between them.",
        )
    zone = min(60, int((centre.x + 180) // 6) + 1)
    return f"EPSG:{(32700 if centre.y < 0 else 32600) + zone}"


def area_km2(geometry: Geometry) -> float:
    """Return the area on the WGS 84 ellipsoid of a geometry in longitude and latitude."""
    from pyproj import Geod
    from shapely.geometry.polygon import orient

    geod = Geod(ellps="WGS84")
    # Orientation decides the sign of geodesic areas: shells counted up, holes down.
    parts = [orient(part) for part in getattr(geometry, "geoms", [geometry])]
    return float(sum(geod.geometry_area_perimeter(part)[0] for part in parts)) / 1e6


def reproject(geometries: NDArray[np.object_], source: str, target: str) -> NDArray[np.object_]:
    """Return an array of shapely geometries transformed from one CRS to another (x first), in one pass."""
    import shapely
    from pyproj import CRS, Transformer

    if CRS.from_user_input(source).equals(CRS.from_user_input(target), ignore_axis_order=True):
        return geometries
    transformer = Transformer.from_crs(source, target, always_xy=True)

    def move(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = transformer.transform(xy[:, 0], xy[:, 1])
        return np.stack([x, y], axis=1)

    return shapely.transform(geometries, move)
