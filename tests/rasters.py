"""Small rasters on the ground of Banepa, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.enums import ColorInterp

from rsosm_cli.geometry import PixelBounds
from rsosm_cli.imagery.prepare import prepare_imagery
from rsosm_cli.settings import FetchSettings

UTM = "EPSG:32645"
WEST, NORTH = 354_000.0, 3_058_000.0  # Banepa, on whole pixels of every lattice used here
ROW, COL = -int(NORTH), int(WEST)  # the same in pixels of 1 m


def write(path: Path, pixels: NDArray[np.generic], *, crs: str | None = UTM, west: float = WEST, north: float = NORTH,
          px: float = 1.0, **extra: object) -> Path:  # fmt: skip
    count, height, width = pixels.shape
    alpha = extra.pop("alpha", False)
    tags = extra.pop("tags", {})
    with rasterio.open(
        path, "w", width=width, height=height, count=count, dtype=pixels.dtype, crs=crs,
        transform=Affine(px, 0, west, 0, -px, north), **{"driver": "GTiff", **extra},
    ) as raster:  # fmt: skip
        if alpha:  # before the first pixel: GTiff fixes the kind of a band then
            raster.colorinterp = [*[ColorInterp.undefined] * (count - 1), ColorInterp.alpha]
        raster.write(pixels)
        raster.update_tags(**tags)
    return path


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(1, 255, shape, dtype=np.uint8)


def place_at(west: float = WEST, north: float = NORTH, width: float = 60, height: float = 60) -> shapely.Geometry:
    box = rasterio.warp.transform_bounds(UTM, "EPSG:4326", west, north - height, west + width, north)
    return shapely.box(*box)


def prepare(tmp_path: Path, *sources: Path | str, place: shapely.Geometry | None = None, **settings: object):
    folder = tmp_path / "city"
    return prepare_imagery(
        [str(s) for s in sources], place or place_at(), folder, folder / "imagery.tif", gsd_m=0.6,
        settings=FetchSettings(**settings),
    )  # fmt: skip


def window(size: int = 64, left: int = 0, top: int = 0) -> PixelBounds:
    return PixelBounds(COL + left, ROW + top, COL + left + size, ROW + top + size)
