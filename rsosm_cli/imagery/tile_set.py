"""Which tiles of a service lie over a place, and at which zoom its pixels are fine enough."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.imagery.service import TileService
from rsosm_cli.imagery.tile_grid import MERCATOR, TileGrid

if TYPE_CHECKING:
    from shapely import Geometry

_MOST_TILES = 2_000_000
_LAST_LATITUDE = 85.05112878  # the square world of web maps ends there
# A zoom is fine enough where its pixels are at most this multiple of the GSD: providers' zooms come in factors of 2.
GSD_SLACK = 1.05


@dataclass(frozen=True)
class TileSet:
    """Tiles of one zoom over a place: columns and rows (N,) in reading order; ``tile_px`` as the service sends them."""

    zoom: int
    tile_px: int
    columns: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.columns)

    def ids(self) -> Iterator[tuple[int, int, int]]:
        return ((self.zoom, int(x), int(y)) for x, y in zip(self.columns, self.rows, strict=True))


def zoom_for(gsd_m: float, tile_px: int, latitude: float, service: TileService | None = None) -> int:
    """Return the coarsest zoom whose pixels are no coarser than ``gsd_m`` (within 5 %), the finest where none is."""
    grid, last = (TileGrid(), 24) if service is None else (service.grid, service.max_zoom)
    zooms = range(0 if service is None or not grid.matrices else service.min_zoom, last)
    return next((z for z in zooms if grid.ground_px_m(z, tile_px, latitude) <= gsd_m * GSD_SLACK), last)


def tiles_over(place: Geometry, zoom: int, tile_px: int, grid: TileGrid | None = None) -> TileSet:
    """Return the tiles that intersect ``place`` (WGS 84), row by row from the north.

    Raises :class:`UsageError` where the tiling does not reach there, or has too many.
    """
    import shapely

    grid = grid or TileGrid()
    world = shapely.box(-180, -_LAST_LATITUDE, 180, _LAST_LATITUDE)
    clipped = shapely.intersection(place, world) if grid.crs == MERCATOR else place
    local = reproject(np.array([clipped], dtype=object), WGS84, grid.crs)[0]
    matrix = grid.matrix(zoom)
    side = matrix.side
    west, south, east, north = shapely.bounds(local)
    if not np.isfinite([west, south, east, north]).all():
        where = (
            f"beyond {_LAST_LATITUDE:.2f} degrees of latitude" if clipped.is_empty else f"where {grid.crs} has no place"
        )
        raise UsageError(
            f"The place lies {where}, and the tiles of the service end before.",
            hint="Give rasters, or a WMTS whose tiles reach there: --imagery wmts:ADDRESS#LAYER",
        )
    x = np.arange(
        max(0, math.floor((west - matrix.left) / side)),
        min(matrix.columns - 1, math.floor((east - matrix.left) / side)) + 1,
    )
    first_row = max(0, math.floor((matrix.top - north) / side))
    last_row = min(matrix.rows - 1, math.floor((matrix.top - south) / side))
    if not len(x) or last_row < first_row:
        return TileSet(zoom, tile_px, np.empty(0, np.int64), np.empty(0, np.int64))
    if len(x) * (last_row - first_row + 1) > 50 * _MOST_TILES:
        raise _too_many(len(x) * (last_row - first_row + 1), zoom)
    shapely.prepare(local)
    columns, rows = [], []
    for y in range(first_row, last_row + 1):  # a row at a time, for memory
        left, top = x * side + matrix.left, matrix.top - y * side
        inside = shapely.intersects(local, shapely.box(left, top - side, left + side, top))
        columns.append(x[inside])
        rows.append(np.full(inside.sum(), y))
    tiles = TileSet(
        zoom, tile_px, np.concatenate(columns).astype(np.int64), np.concatenate(rows).astype(np.int64)
    )  # fmt: skip
    if len(tiles) > _MOST_TILES:
        raise _too_many(len(tiles), zoom)
    return tiles


def _too_many(tiles: int, zoom: int) -> UsageError:
    return UsageError(
        f"The place has {tiles:,} tiles at zoom {zoom}, more than the {_MOST_TILES:,} that are fetched at a time.",
        hint="Choose a coarser --gsd, a smaller place, or a raster of the provider.",
    )
