"""A map at the size of a screen, with what is needed to draw it: the ground of the PNG and of the HTML page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.products.raster import bounded

if TYPE_CHECKING:
    from shapely import Geometry

# Entries of a sequential ramp for values, dark to light (the "lapaz" idea: lightness rises evenly, hues stay apart
# for colour-blind eyes).
RAMP: tuple[str, ...] = ("#1b1464", "#253c85", "#2f6295", "#46849a", "#72a093", "#a6b68a", "#dccb96", "#fdf0dc")


@dataclass(frozen=True)
class LegendEntry:
    name: str
    colour: str  # #rrggbb
    share: float | None = None  # of the mapped ground, 0..1


@dataclass(frozen=True)
class MapView:
    """A map of at most a few million pixels. ``values`` are classes (uint8, 255 for none) or numbers (NaN for none)."""

    title: str
    city: str
    values: NDArray[Any]  # (H, W)
    image: NDArray[np.uint8] | None  # (H, W, 3)
    bounds_m: tuple[float, float, float, float]  # west, south, east, north
    crs: str
    legend: tuple[LegendEntry, ...] = ()
    place: Geometry | None = None  # in ``crs``
    unit: str = ""
    attribution: str = ""
    colours: NDArray[np.uint8] | None = None  # (H, W, 4) ready colours of a picture that is no map of classes or values
    note: str = ""  # said under the legend
    background: int | None = None  # class that stands back, so that the image shows under it

    @property
    def is_classes(self) -> bool:
        return self.values.dtype.kind in "iu"

    @property
    def metres_per_pixel(self) -> float:
        return (self.bounds_m[2] - self.bounds_m[0]) / self.values.shape[1]

    @property
    def known(self) -> NDArray[np.bool_]:
        """(H, W) pixels that the map says something of."""
        return self.values != 255 if self.is_classes else np.isfinite(self.values)

    @property
    def value_range(self) -> tuple[float, float]:
        """Lowest and highest value drawn: 0 or the 2nd percentile, and the 98th, so that outliers do not rule."""
        known = self.values[self.known]
        if not len(known):
            return 0.0, 1.0
        low, high = np.percentile(known, [2, 98]).tolist()
        low = 0.0 if 0 <= low < 0.3 * high else low
        return low, high if high > low else low + 1.0

    def rgba(self) -> NDArray[np.uint8]:
        """Return (H, W, 4) the colours of the map; nothing known is transparent."""
        if self.colours is not None:
            return self.colours
        if self.is_classes:
            table = np.zeros((256, 4), np.uint8)
            for k, entry in enumerate(self.legend):
                table[k] = (*rgb(entry.colour), 255)
            return table[self.values]
        low, high = self.value_range
        place = np.clip((np.nan_to_num(self.values) - low) / (high - low), 0, 1) * (len(RAMP) - 1)
        stops = np.array([rgb(c) for c in RAMP], float)
        colours = np.stack([np.interp(place, np.arange(len(RAMP)), stops[:, i]) for i in range(3)], axis=-1)
        alpha = np.where(self.known, 255.0, 0.0)[..., None]
        return np.concatenate([colours, alpha], axis=-1).round().astype(np.uint8)


def rgb(colour: str) -> tuple[int, int, int]:
    """Return the three bytes of ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


class Reads(Protocol):
    """What :class:`imagery.reader.ImageReader` does."""

    def read(self, projection: Projection, bounds_px: PixelBounds) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]: ...


def read_view(path: Path, image: Reads | None, *, longest_px: int, **facts: Any) -> MapView:
    """Return the map at ``path`` with the image under it, the longer side at most ``longest_px`` pixels.

    Classes are the commonest of the pixels that they stand for, numbers the mean.
    """
    with bounded(), rasterio.open(path) as raster:
        factor = max(1, math.ceil(max(raster.width, raster.height) / longest_px))
        shape = (math.ceil(raster.height / factor), math.ceil(raster.width / factor))
        counts = raster.dtypes[0] == "uint8"
        values = raster.read(1, out_shape=shape, resampling=Resampling.mode if counts else Resampling.average)
        # Cells of many metres are drawn as squares, so that the image under them can be read.
        zoom = max(1, longest_px // (2 * max(shape)))
        values, shape = values.repeat(zoom, 0).repeat(zoom, 1), (shape[0] * zoom, shape[1] * zoom)
        gsd, crs = raster.transform.a * factor / zoom, raster.crs.to_string()
        west, north = raster.transform.c, raster.transform.f
        if not counts:
            values = np.where(values == raster.nodata, np.nan, values)
    bounds = (west, north - shape[0] * gsd, west + shape[1] * gsd, north)
    picture = None
    if image is not None:
        # The image is read on the lattice of its own pixel size and shown within the bounds of the map.
        projection = Projection(crs, gsd)
        col, row = round(west / gsd), round(-north / gsd)
        picture = as_rgb(*image.read(projection, PixelBounds(col, row, col + shape[1], row + shape[0])))
    return MapView(values=values, image=picture, bounds_m=bounds, crs=crs, **facts)


def as_rgb(image: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return (H, W, 3) of (C, H, W): the first three bands, or one as grey; white where there is no image."""
    bands = image[:3] if len(image) >= 3 else image[[0, 0, 0]]
    return np.where(valid[..., None], np.moveaxis(bands, 0, -1), 255).astype(np.uint8)
