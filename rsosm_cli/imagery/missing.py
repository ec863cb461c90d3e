"""Missing image that is shown as a colour: white (or black) ground in a raster without a nodata value.

A pixel is missing where all its bands have the value and it lies in a square of 17 pixels that all have it: a white
roof or a parked car is image. In imagery that was compressed with loss the value is blurred: there, 3 grey levels off
count as the value, and pixels up to 8 away from missing ones (the block of JPEG) go with them if they are within 24.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, minimum_filter

from rsosm_cli.imagery.raster import Raster, open_raster, read_pixels
from rsosm_cli.progress import Advance
from rsosm_cli.workspace import atomic

_SQUARE_PX = 17  # two JPEG blocks and the pixel between: odd, so that the filters have a centre
_LOSSY_LEVELS = 3
_FRINGE_LEVELS = 24
_FRINGE_PX = 8
# How far a pixel's verdict can depend on others: the square both ways, and the fringe.
HALO_PX = 2 * _SQUARE_PX + _FRINGE_PX
_STRIP_PX = 512


def missing_pixels(image: NDArray[np.generic], value: int, lossy: bool) -> NDArray[np.bool_]:
    """Return where ``image`` (C, H, W) is missing, (H, W); outside of it counts as missing."""
    distance = np.abs(image.astype(np.float32) - value).max(axis=0)  # (H, W) grey levels
    exact = distance <= (_LOSSY_LEVELS if lossy else 0)
    core = minimum_filter(exact.view(np.uint8), _SQUARE_PX, mode="constant", cval=1)
    missing = maximum_filter(core, _SQUARE_PX, mode="constant", cval=0).astype(bool)
    if lossy:
        near = maximum_filter(missing.view(np.uint8), 2 * _FRINGE_PX + 1, mode="constant", cval=0)
        missing |= near.astype(bool) & (distance <= _FRINGE_LEVELS)
    return missing


def write_mask(raster: Raster, target: Path, value: int, advance: Advance) -> None:
    """Write a one-band raster on the lattice of ``raster``: 255 where there is image, 0 where it is missing.

    ``advance`` is told the rows that are done.
    """
    profile = {
        "driver": "GTiff", "width": raster.width, "height": raster.height, "count": 1, "dtype": "uint8",
        "crs": raster.crs, "transform": raster.transform, "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "DEFLATE", "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    with (
        open_raster(raster.path) as source,
        atomic(target) as part,
        rasterio.open(part, "w", **profile) as mask,
    ):
        for top in range(0, raster.height, _STRIP_PX):
            bottom = min(top + _STRIP_PX, raster.height)
            first, last = max(0, top - HALO_PX), min(raster.height, bottom + HALO_PX)
            window = ((first, last), (0, raster.width))
            image, valid = read_pixels(source, list(raster.bands), opaque=raster.opaque, window=window)
            valid &= ~missing_pixels(image, value, raster.lossy)
            inner = valid[top - first : bottom - first].astype(np.uint8) * 255
            mask.write(inner, 1, window=((top, bottom), (0, raster.width)))
            advance(bottom - top)
