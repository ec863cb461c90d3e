"""Whether a GeoTIFF is all there: a copy or download that broke off still opens, as its header stands in front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsosm_cli.errors import SourceError
from rsosm_cli.imagery.raster import open_raster
from rsosm_cli.units import size

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

_MOST_BYTES = 64 << 20  # of a block that is decoded


def check_whole(path: str) -> None:
    """Raise :class:`SourceError` where a local GeoTIFF ends before its pixels do, or its last blocks are damaged.

    GDAL says where each block of each band stands: that is compared with the file's size. The last block of the bands,
    of their masks and of each overview is decoded. Other rasters, and the blocks in between, are believed.
    """
    if path.startswith("/vsi") or not Path(path).is_file():
        return
    with open_raster(path) as source:
        if source.driver != "GTiff":
            return
        overviews = len(source.overviews(1))
        needed, there = _end(source), os.path.getsize(path)
        if needed > there:
            raise SourceError(
                f"{path} is cut off: its pixels reach to {size(needed)} ({needed:,} bytes), and the file ends at "
                f"{size(there)} ({there:,} bytes).",
                hint="Copy or download it again.",
                path=path,
            )
        _decode_last(source, path)
    for level in range(overviews):
        with open_raster(path, overview_level=level) as source:
            _decode_last(source, path)


def _end(source: DatasetReader) -> int:
    """Return where the last block of all bands ends, in bytes; blocks that were never written stand nowhere."""
    ends = [0]
    for band, (height, width) in enumerate(source.block_shapes, 1):
        for y in range(-(-source.height // height)):
            for x in range(-(-source.width // width)):
                start = source.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", band)
                if start is not None:
                    ends.append(int(start) + int(source.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", band)))
        if source.interleaving and source.interleaving.value == "PIXEL":  # one block holds all bands
            break
    return max(ends)


def _decode_last(source: DatasetReader, path: str) -> None:
    height, width = source.block_shapes[0]
    if height * width * source.count * np.dtype(source.dtypes[0]).itemsize > _MOST_BYTES:
        return
    row, col = (source.height - 1) // height * height, (source.width - 1) // width * width
    window = Window(col, row, source.width - col, source.height - row)
    try:
        source.read(window=window)
        source.read_masks(window=window)
    except RasterioError:
        raise SourceError(
            f"{path} is damaged: its last pixels cannot be read.", hint="Copy or download it again.", path=path
        ) from None
