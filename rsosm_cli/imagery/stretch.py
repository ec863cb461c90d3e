"""From more than 8 bits to 8: between which values a raster's bands are stretched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsosm_cli.errors import SourceError
from rsosm_cli.imagery.raster import Raster, open_raster, read_pixels
from rsosm_cli.imagery.sources import address_of

# (low, high) of each band: what becomes 0 and 255.
Stretch = tuple[tuple[float, float], ...]

# Side of the reduced picture from which the stretch of a raster that is not 8-bit is taken, in pixels.
_SAMPLE_PX = 1024
# Rasters that contribute to the stretch of a mosaic: more would only slow the start.
_SAMPLE_RASTERS = 64
_PERCENTILES = (2.0, 98.0)


def is_stretched(raster: Raster) -> bool:
    """Whether the values of a raster are no grey levels yet: 8-bit rasters are taken as they are."""
    return raster.dtype != "uint8"


def stretch_of(rasters: Sequence[Raster], bands: int, *, nodata: int | None = None) -> Stretch | None:
    """Return (low, high) of each band for 8 bits, percentiles 2 and 98 over all rasters; None where all are 8-bit.

    One stretch for a whole mosaic: one a raster would show as steps of brightness at the joints. 8-bit rasters have no
    part in it, and pixels that are ``nodata`` in every band have none. Raises :class:`SourceError` where one stretch
    cannot fit: reflectances from 0 to 1 beside counts in thousands.
    """
    deep = [raster for raster in rasters if is_stretched(raster)]
    if not deep:
        return None
    _check_alike(deep)
    step = max(1, -(-len(deep) // _SAMPLE_RASTERS))
    samples: list[list[np.ndarray]] = [[] for _ in range(bands)]
    for raster in deep[::step]:
        with open_raster(raster.path) as source:
            factor = max(1.0, max(source.width, source.height) / _SAMPLE_PX)
            shape = (max(1, round(source.height / factor)), max(1, round(source.width / factor)))
            indexes = list(raster.bands[:bands])
            pixels, valid = read_pixels(source, indexes, opaque=raster.opaque, out_shape=(bands, *shape))
        valid &= np.isfinite(pixels).all(axis=0)
        if nodata is not None:
            valid &= (pixels != nodata).any(axis=0)
        for band in range(bands):
            samples[band].append(pixels[band][valid].astype(np.float64))
    ranges = []
    for values in samples:
        joined = np.concatenate(values)
        low, high = np.percentile(joined, _PERCENTILES) if len(joined) else (0.0, 1.0)
        ranges.append((float(low), float(high if high > low else low + 1)))
    return tuple(ranges)


def _check_alike(rasters: Sequence[Raster]) -> None:
    real = next((r for r in rasters if np.issubdtype(r.dtype, np.inexact)), None)
    whole = next((r for r in rasters if np.issubdtype(r.dtype, np.integer)), None)
    if real is not None and whole is not None:
        raise SourceError(
            f"{address_of(real.path)} holds {real.dtype} and {address_of(whole.path)} {whole.dtype}: one stretch to "
            "8 bits does not fit both.",
            hint="Bring them to one scale first, or fetch them one by one with --epoch.",
        )
