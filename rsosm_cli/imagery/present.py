"""Whether imagery holds image: a raster may reach over a place and have nothing there but nodata or NaN.

Looked at in small windows about spots of the place: what is read stays the same however large the imagery is. Nothing
is read of rasters whose header says that every pixel is image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from numpy.typing import NDArray

from rsosm_cli.errors import SourceError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.imagery.raster import GDAL_NETWORK, Raster, inspect, open_raster, read_pixels
from rsosm_cli.imagery.sources import address_of

if TYPE_CHECKING:
    from shapely import Geometry

LITTLE = 0.1  # share of image below which it is said
_ROWS = (8, 32)  # spots a side of the place; the second only where the first show no image at all
_SPOT_PX = 32


def image_share(mosaic: Path, rasters: Sequence[Raster], place: Geometry, *, nodata: int | None = None) -> float:
    """Return the share of image, 0 to 1, in the part of ``place`` (WGS 84) that a mosaic of ``rasters`` reaches over.

    ``nodata``: the colour that the mosaic takes for missing image. Estimated at 64 spots; it is 0 only where 1024 show
    no image. Raises :class:`SourceError` for damaged pixels.
    """
    import shapely

    if nodata is None and not any(r.missing for r in rasters):
        return 1.0
    whole = inspect(str(mosaic))
    boxes = shapely.box(*zip(*[r.bounds_wgs84() for r in rasters], strict=True))
    reached = shapely.intersection(place, shapely.union_all(boxes))
    share = 1.0
    for rows in _ROWS if shapely.area(reached) > 0 else ():
        spots = _spots(reached, rows)
        share = float(_image_at(whole, spots).mean())
        if share > 0:
            break
    return share


def _spots(area: Geometry, rows: int) -> NDArray[np.float64]:
    """Return points (N, 2) of an area: those of a lattice that lie in it, and one that surely does."""
    import shapely

    west, south, east, north = shapely.bounds(area)
    steps = (np.arange(rows) + 0.5) / rows
    points = shapely.points(*np.meshgrid(west + steps * (east - west), north - steps * (north - south))).ravel()
    shapely.prepare(area)
    inside = points[shapely.intersects(area, points)]
    return shapely.get_coordinates([*inside, shapely.point_on_surface(area)])


def _image_at(raster: Raster, spots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of image in the window about each of ``spots`` (N, 2), WGS 84; 0 outside of the raster."""
    import shapely

    found = np.zeros(len(spots))
    xy = shapely.get_coordinates(reproject(shapely.points(spots), WGS84, raster.crs))
    col, row = ~raster.transform * xy.T
    inside = (col >= 0) & (col < raster.width) & (row >= 0) & (row < raster.height)
    if not inside.any():
        return found
    with rasterio.Env(**GDAL_NETWORK), open_raster(raster.path) as source:
        for i in np.flatnonzero(inside):
            rows, columns = (
                (max(0, int(at) - _SPOT_PX // 2), min(side, int(at) + _SPOT_PX // 2))
                for at, side in ((row[i], raster.height), (col[i], raster.width))
            )
            found[i] = read_pixels(source, list(raster.bands), window=(rows, columns))[1].mean()
    return found


def no_image(*names: str) -> SourceError:
    what = address_of(names[0]) if len(names) == 1 else f"Each of the {len(names)} rasters"
    return SourceError(
        f"{what} holds no image of the place: every pixel looked at there is nodata, transparent or NaN.",
        hint="Choose other imagery, or check its nodata value and --nodata.",
    )


def little_image(name: str, share: float) -> str:
    return f"Of the pixels of {name} over the place, only some {100 * share:.1g} % are image; the others are missing."
