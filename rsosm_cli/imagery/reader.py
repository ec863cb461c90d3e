"""Reading imagery in windows of the lattice of a projection, the same pixels whatever the window.

Every window is cut from blocks of a fixed lattice, each resampled once and in one way. Two windows that overlap agree
bit for bit: GDAL's resampling of a window by itself depends on the window (it interpolates coordinates along its rows).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from pyproj import CRS, Transformer
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from rsosm_cli.errors import SourceError
from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.imagery.bands import check_bands
from rsosm_cli.imagery.ordered import ordered_vrt
from rsosm_cli.imagery.raster import Raster, inspect, network
from rsosm_cli.imagery.sources import address_of
from rsosm_cli.imagery.stretch import Stretch, stretch_of
from rsosm_cli.imagery.whole import lost

# Side of the blocks that are resampled at a time, in pixels. Large enough that a block's fixed cost (about a
# millisecond) vanishes, small enough that a single window of 224 pixels wastes little.
BLOCK_PX = 512
# Largest error of the interpolated coordinates, in source pixels. rasterio refuses 0; GDAL's own default is 0.125.
_TOLERANCE_PX = 0.01
_OVERVIEW_PX = 4.0
# Alpha at which a resampled pixel counts as image: at least half of what it was made from.
_HALF = 128


def cache_mb_of(shape_px: tuple[int, int], bands: int) -> int:
    """Return the MiB of the resampled blocks that ``shape_px`` (rows, columns) can lie in, wherever it starts."""
    rows, columns = (-(-n // BLOCK_PX) + 1 for n in shape_px)
    return math.ceil(rows * columns * (bands + 1) * BLOCK_PX**2 / 2**20)


class ImageReader:
    """Reads 8-bit windows of a raster on the lattice of any projected CRS.

    Averages over the source pixels under a pixel where the lattice is coarser than the raster, interpolates
    bilinearly where it is finer. Rasters of more than 8 bits are stretched: as recorded in a mosaic of ours, else
    between the percentiles 2 and 98 of the raster. Keeps at most ``cache_mb`` MiB of resampled blocks, and lets GDAL
    keep ``gdal_cache_mb`` MiB of decoded ones. Not to be shared among threads; pickling reopens the file.

    Raises :class:`MissingError` and :class:`SourceError` for a file that is none or lies nowhere, and
    :class:`UsageError` for bands it has not.
    """

    def __init__(
        self, path: Path | str, bands: Sequence[int] = (1, 2, 3), *, cache_mb: int = 256, gdal_cache_mb: int = 128
    ) -> None:
        self.path = str(path)
        self.bands = tuple(bands)
        self.cache_mb = cache_mb
        self.gdal_cache_mb = gdal_cache_mb
        self.raster: Raster = inspect(self.path)
        check_bands(self.path, self.count, self.bands)
        self.stretch: Stretch | None = stretch_of([self.raster], self.count)
        self._lattices: dict[Projection, _Lattice] = {}
        self._blocks: OrderedDict[tuple[Projection, int, int], NDArray[np.uint8]] = OrderedDict()
        self._kept = 0

    @property
    def count(self) -> int:
        """Bands of the file, alpha aside."""
        return len(self.raster.bands)

    def bounds_in(self, crs: str) -> tuple[float, float, float, float]:
        """Return (west, south, east, north) of the raster in ``crs``."""
        return _bounds_in(self.raster, crs)

    def gsd_in(self, crs: str) -> float:
        """Return the side of a pixel of the raster in metres of ``crs``, in the middle of the raster."""
        return gsd_in(self.raster, crs)

    def read(self, projection: Projection, bounds_px: PixelBounds) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the image (C, H, W) uint8 and where there is any, (H, W) bool; pixels without image are 0."""
        joined = np.zeros((len(self.bands) + 1, max(0, bounds_px.height), max(0, bounds_px.width)), np.uint8)
        lattice = self._lattices.get(projection)
        if lattice is None:
            lattice = self._lattices[projection] = _Lattice(self, projection)
        inside = bounds_px.intersection(lattice.bounds_px)
        if not inside.empty:
            with rasterio.Env(GDAL_CACHEMAX=self.gdal_cache_mb * 2**20, **network()):
                for row in range(inside.row_min // BLOCK_PX, -(-inside.row_max // BLOCK_PX)):
                    for col in range(inside.col_min // BLOCK_PX, -(-inside.col_max // BLOCK_PX)):
                        block = PixelBounds(col * BLOCK_PX, row * BLOCK_PX, (col + 1) * BLOCK_PX, (row + 1) * BLOCK_PX)
                        part = block.intersection(bounds_px)
                        joined[_slices(part, bounds_px)] = self._block(lattice, col, row)[_slices(part, block)]
        return joined[:-1], joined[-1].astype(bool)

    def _block(self, lattice: _Lattice, col: int, row: int) -> NDArray[np.uint8]:
        """Return block (col, row): (C + 1, BLOCK_PX, BLOCK_PX) uint8, the last plane 1 where there is image."""
        key = (lattice.projection, col, row)
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
            return block
        block = lattice.warp(col, row)
        self._blocks[key] = block
        self._kept += block.nbytes
        while self._kept > self.cache_mb * 2**20 and len(self._blocks) > 1:
            self._kept -= self._blocks.popitem(last=False)[1].nbytes
        return block

    def close(self) -> None:
        for lattice in self._lattices.values():
            lattice.close()
        self._lattices.clear()
        self._blocks.clear()
        self._kept = 0

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.bands, self.cache_mb, self.gdal_cache_mb)


def gsd_in(raster: Raster, crs: str) -> float:
    """Return the side of a pixel of a raster in metres of ``crs``, in the middle of the raster."""
    unit = Projection(crs, 1.0)
    return 1 / math.sqrt(_source_pixels_under(raster, unit, unit.pixels_around(*_bounds_in(raster, crs))))


def _reopen(path: str, bands: tuple[int, ...], cache_mb: int, gdal_cache_mb: int) -> ImageReader:
    return ImageReader(path, bands, cache_mb=cache_mb, gdal_cache_mb=gdal_cache_mb)


class _Lattice:
    """A raster warped to one lattice, kept open; ``bounds_px`` are whole blocks around the raster."""

    def __init__(self, reader: ImageReader, projection: Projection) -> None:
        raster = reader.raster
        self.path = raster.path
        self.projection = projection
        around = projection.pixels_around(*_bounds_in(raster, projection.crs))
        self.bounds_px = PixelBounds(
            around.col_min // BLOCK_PX * BLOCK_PX,
            around.row_min // BLOCK_PX * BLOCK_PX,
            -(-around.col_max // BLOCK_PX) * BLOCK_PX,
            -(-around.row_max // BLOCK_PX) * BLOCK_PX,
        )
        under = _source_pixels_under(raster, projection, around)
        # Overviews spare reading a whole city for a small picture. Who made them, and how, is unknown: the coarsest
        # one that leaves at least 4 x 4 of its pixels to average.
        fitting = [i for i, factor in enumerate(raster.overviews) if math.sqrt(under) / factor >= _OVERVIEW_PX]
        if fitting:
            raster = raster.at_overview(max(fitting, key=lambda i: raster.overviews[i]))
        coarser = under >= 1
        self._source = rasterio.open(ordered_vrt(raster, [b - 1 for b in reader.bands], reader.stretch))
        self._vrt = WarpedVRT(
            self._source,
            crs=projection.crs,
            transform=projection.transform_of(self.bounds_px),
            width=self.bounds_px.width,
            height=self.bounds_px.height,
            resampling=Resampling.average if coarser else Resampling.bilinear,
            tolerance=_TOLERANCE_PX,
        )

    def warp(self, col: int, row: int) -> NDArray[np.uint8]:
        x = col * BLOCK_PX - self.bounds_px.col_min
        y = row * BLOCK_PX - self.bounds_px.row_min
        try:
            block = self._vrt.read(window=((y, y + BLOCK_PX), (x, x + BLOCK_PX)))  # (C + 1, B, B)
        except RasterioError as error:
            if address_of(self.path) == self.path and (gone := lost(self.path)) is not None:
                raise SourceError(
                    f"The imagery cannot be read: {Path(self.path).name} is made of {gone}, which is not there.",
                    hint="Bring it back, or fetch other imagery: rsosm fetch --imagery SOURCE",
                    path=gone,
                ) from None
            detail = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            raise SourceError(
                f"The imagery cannot be read: {detail}.", hint="Is the file damaged, or was it moved since fetch?"
            ) from error
        image, alpha = block[:-1], block[-1]
        # GDAL mixes partly covered pixels with its black ground; the share of the image says by how much.
        partial = (alpha >= _HALF) & (alpha < 255)
        if partial.any():
            restored = image[:, partial] * (255.0 / alpha[partial])
            image[:, partial] = np.minimum(np.rint(restored), 255).astype(np.uint8)
        valid = alpha >= _HALF
        image[:, ~valid] = 0
        block[-1] = valid
        return block

    def close(self) -> None:
        self._vrt.close()
        self._source.close()


def _slices(part: PixelBounds, whole: PixelBounds) -> tuple[slice, slice, slice]:
    return (
        slice(None),
        slice(part.row_min - whole.row_min, part.row_max - whole.row_min),
        slice(part.col_min - whole.col_min, part.col_max - whole.col_min),
    )


def _bounds_in(raster: Raster, crs: str) -> tuple[float, float, float, float]:
    bounds = transform_bounds(raster.crs, crs, *raster.bounds, densify_pts=21)
    area = CRS.from_user_input(crs).area_of_use
    if area is None:
        return bounds
    # A raster of a whole continent cannot be laid out in one zone: only its part near the zone can be asked for.
    west, south, east, north = raster.bounds_wgs84()
    if all(map(math.isfinite, bounds)) and east - west < 12 and west > area.west - 12 and east < area.east + 12:
        return bounds
    box = max(west, area.west - 3), max(south, area.south), min(east, area.east + 3), min(north, area.north)
    if box[0] >= box[2] or box[1] >= box[3]:
        return 0.0, 0.0, 0.0, 0.0
    return transform_bounds("EPSG:4326", crs, *box, densify_pts=21)


def _source_pixels_under(raster: Raster, projection: Projection, around: PixelBounds) -> float:
    """Return how many source pixels lie under a pixel of the lattice, in the middle of the raster."""
    g = projection.gsd_m
    x, y = (around.col_min + around.col_max) / 2 * g, -(around.row_min + around.row_max) / 2 * g
    transformer = Transformer.from_crs(projection.crs, raster.crs, always_xy=True)
    xs, ys = transformer.transform([x, x + g, x], [y, y, y - g])
    t, (x0, x1, x2), (y0, y1, y2) = raster.transform, xs, ys
    # Area under the pixel in units of the source's CRS, over the area of a source pixel.
    return abs((x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)) / abs(t.a * t.e - t.b * t.d)
