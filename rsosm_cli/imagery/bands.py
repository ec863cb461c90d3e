"""Which bands rasters have and which are wanted: numbers that differ, and alpha bands that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rasterio.windows import Window

from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.imagery.raster import Raster, open_raster
from rsosm_cli.imagery.sources import address_of

_COLOURS = 3  # red, green, blue: what every later step reads unless told otherwise
_LOOKED_AT = 8  # rasters whose alpha is looked at: those of one mosaic come from one program
_WINDOW_PX = 64
_GRADES = 16  # values that no brush of one transparency leaves


def same_bands(rasters: Sequence[Raster], *, pictures: bool = False) -> tuple[list[Raster], list[str]]:
    """Return the rasters with what the image has of each, and sentences on what becomes of those that differ.

    One grey band beside colours of the same type stands for red, green and blue. ``pictures``: whether images of a tile
    service or of STAC, of three bands, come to them. Raises :class:`SourceError` where a raster would bring the image
    below the colours of the others.
    """
    colours = [r for r in rasters if len(r.bands) >= _COLOURS]
    types = {r.dtype for r in colours} | ({"uint8"} if pictures else set())
    grey = [r.grey and len(r.bands) == 1 and r.dtype in types for r in rasters]
    same = [
        replace(r, bands=r.bands * _COLOURS) if alone else r for r, alone in zip(rasters, grey, strict=True)
    ]  # fmt: skip
    counts = [len(r.bands) for r in same] + ([_COLOURS] if pictures else [])
    least, most = min(counts), max(counts)
    notes = []
    if any(grey):
        first = address_of(rasters[grey.index(True)].path)
        which = f"{first} is" if sum(grey) == 1 else f"{first} and {sum(grey) - 1} more are"
        notes.append(f"{which} grey, and shown in grey beside the colours of the others.")
    if least < most and least < _COLOURS:
        few = address_of(same[counts.index(least)].path)
        rich = next((address_of(r.path) for r in same if len(r.bands) == most), "the other imagery")
        each = ",".join(map(str, range(1, least + 1)))
        raise SourceError(
            f"{few} has {_count(least)}, and {rich} {most}: an image of both would have {least}.",
            hint=f"Leave it out, keep of all of them what each has (--bands {each}), or make a copy "
            "with more bands: gdal_translate -b 1 -b 1 -b 1 FILE COPY",
            path=few,
        )
    if least < most:
        notes.append(f"The rasters have {least} to {most} bands: of each, the first {least} are kept.")
    return same, notes


def _count(bands: int) -> str:
    return "1 band" if bands == 1 else f"{bands} bands"


def check_bands(path: str, available: int, wanted: Sequence[int]) -> None:
    """Raise :class:`UsageError` where a raster has not the bands wanted (counted from 1)."""
    beyond = [b for b in wanted if not 1 <= b <= available]
    if beyond or not wanted:
        what = f"band {beyond[0]} is" if beyond else "no band is"
        raise UsageError(
            f"{path} has {_count(available)}, and {what} asked for.",
            hint=f"Choose among 1 to {available} with --bands (a band may be repeated: --bands 1,1,1).",
            path=path,
            bands=list(wanted),
        )


def doubtful_alpha(rasters: Sequence[Raster]) -> list[str]:
    """Return a sentence where bands that are declared as transparency have values as image has.

    GDAL declares the fourth of four 8-bit bands so wherever nothing else is said: near infrared, as often as not.
    """
    declared = [r for r in rasters if r.clear is not None and not r.opaque and {"mask", "alpha"} & set(r.missing)]
    for raster in declared[:_LOOKED_AT]:
        if _graded(raster):
            wanted = ",".join(map(str, range(1, len(raster.bands) + 2)))
            return [
                f"Band {raster.clear} of {address_of(raster.path)} is declared as transparency, and varies as image "
                f"does: where it is low, image is missing. If it is near infrared, read it as a band: --bands {wanted}"
            ]
    return []


def _graded(raster: Raster) -> bool:
    """Whether an alpha band is neither clear nor opaque in most pixels of a few windows: soft edges are narrow."""
    assert raster.clear is not None
    found = []
    with open_raster(raster.path) as source:
        rows, columns = (np.linspace(0, max(0, n - _WINDOW_PX), 3).astype(int) for n in (raster.height, raster.width))
        for row in np.unique(rows):
            for column in np.unique(columns):
                window = Window(column, row, min(_WINDOW_PX, raster.width), min(_WINDOW_PX, raster.height))
                found.append(source.read(raster.clear, window=window).ravel())
        opaque = np.iinfo(source.dtypes[raster.clear - 1]).max
    values = np.concatenate(found)
    between = values[(values > 0) & (values < opaque)]
    return len(between) > len(values) / 2 and len(np.unique(between)) >= _GRADES
