"""Whether imagery holds image: a raster may reach over a place and have nothing there but nodata, NaN or black.

Looked at in small windows about spots of the place: what is read stays the same however large the imagery is. Of
rasters whose header says that every pixel is image, reading ends with the second value that is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
from numpy.typing import NDArray

from rsosm_cli.errors import SourceError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.imagery.raster import GDAL_NETWORK, Raster, inspect, open_raster, read_pixels
from rsosm_cli.imagery.sources import address_of
from rsosm_cli.imagery.stretch import Stretch, is_stretched

if TYPE_CHECKING:
    from shapely import Geometry

LITTLE = 0.1  # share of image below which it is said
_ROWS = (8, 32)  # spots a side of the place; the second only where the first show no image at all
_SPOT_PX = 32


def image_share(
    mosaic: Path,
    rasters: Sequence[Raster],
    place: Geometry,
    *,
    nodata: int | None = None,
    stretch: Stretch | None = None,
) -> float:
    """Return the share of image, 0 to 1, in the part of ``place`` (WGS 84) that a mosaic of ``rasters`` reaches over.

    ``nodata``: the colour that the mosaic takes for missing image; ``stretch``: what it made of deeper rasters.
    Estimated at 64 spots. Raises :class:`SourceError` where 1024 spots show no image, or one single value in all their
    bands; and for damaged pixels.
    """
    import shapely

    whole = inspect(str(mosaic))
    boxes = shapely.box(*zip(*[r.bounds_wgs84() for r in rasters], strict=True))
    reached = shapely.intersection(place, shapely.union_all(boxes))
    if shapely.area(reached) == 0:
        return 1.0
    full = nodata is None and not any(r.missing for r in rasters)
    for rows in _ROWS:
        shares: list[float] = []
        values: set[int] = set()
        for share, low, high in _image_at(whole, _spots(reached, rows)):
            shares.append(share)
            values |= {low, high} if share > 0 else set()
            if full and len(values) > 1:
                return 1.0
        if len(values) > 1:
            return float(np.mean(shares))
    names = [r.path for r in rasters]
    if not values:
        raise no_image(*names)
    stored = _stored(values.pop(), rasters, stretch)
    if len(stored) > 1:
        return float(np.mean(shares))  # bands of one value each: a colour
    raise _plain(stored.pop(), *names)


def _stored(grey_level: int, rasters: Sequence[Raster], stretch: Stretch | None) -> set[float]:
    """Return the values, over bands and rasters, that the mosaic shows as a grey level."""
    deep = [low + grey_level * (high - low) / 255 for low, high in stretch or ()]
    return {*deep, *(float(grey_level) for raster in rasters if not is_stretched(raster))}


def _spots(area: Geometry, rows: int) -> NDArray[np.float64]:
    """Return points (N, 2) of an area: one that surely lies in it, and those of a lattice that do."""
    import shapely

    west, south, east, north = shapely.bounds(area)
    steps = (np.arange(rows) + 0.5) / rows
    points = shapely.points(*np.meshgrid(west + steps * (east - west), north - steps * (north - south))).ravel()
    shapely.prepare(area)
    inside = points[shapely.intersects(area, points)]
    return shapely.get_coordinates([shapely.point_on_surface(area), *inside])


def _image_at(raster: Raster, spots: NDArray[np.float64]) -> Iterator[tuple[float, int, int]]:
    """Yield the share of image in the window about each of ``spots`` (N, 2), WGS 84, and its least and largest value.

    The share is 0 outside of the raster; where it is, the values are none.
    """
    import shapely

    xy = shapely.get_coordinates(reproject(shapely.points(spots), WGS84, raster.crs))
    col, row = ~raster.transform * xy.T
    inside = (col >= 0) & (col < raster.width) & (row >= 0) & (row < raster.height)
    with rasterio.Env(**GDAL_NETWORK), open_raster(raster.path) as source:
        for i in range(len(spots)):
            if not inside[i]:
                yield 0.0, 0, 0
                continue
            rows, columns = (
                (max(0, int(at) - _SPOT_PX // 2), min(side, int(at) + _SPOT_PX // 2))
                for at, side in ((row[i], raster.height), (col[i], raster.width))
            )
            pixels, valid = read_pixels(source, list(raster.bands), window=(rows, columns))
            seen = pixels[:, valid]
            yield float(valid.mean()), int(seen.min(initial=255)), int(seen.max(initial=0))


def no_image(*names: str) -> SourceError:
    return SourceError(
        f"{_named(*names)} holds no image of the place: every pixel looked at there is nodata, transparent or NaN.",
        hint="Choose other imagery, or check its nodata value and --nodata.",
    )


def _plain(value: float, *names: str) -> SourceError:
    """Return the error for imagery of one single value: no camera gives that, not even over water."""
    return SourceError(
        f"{_named(*names)} shows no image of the place: every pixel looked at there is {value:g} in every band.",
        hint="Choose other imagery. What stands for missing image, beside rasters that have it, is said with --nodata "
        f"{value:g}.",
    )


def _named(*names: str) -> str:
    return address_of(names[0]) if len(names) == 1 else f"Each of the {len(names)} rasters"


def little_image(name: str, share: float) -> str:
    return f"Of the pixels of {name} over the place, only some {100 * share:.1g} % are image; the others are missing."
