"""Whether a GeoTIFF is all there: a copy or download that broke off still opens, as its header stands in front."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import unescape

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import MaskFlags
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsosm_cli.errors import SourceError
from rsosm_cli.imagery.raster import check_remote, open_raster
from rsosm_cli.imagery.sources import address_of
from rsosm_cli.units import size

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

_MOST_BYTES = 64 << 20  # of a block that is decoded
_DECODED = 16  # blocks
_HEAD = 16  # bytes; whatever the compressions below write begins with others than zeros
_NEVER_ZERO = ("DEFLATE", "JPEG", "LERC", "LERC_DEFLATE", "LERC_ZSTD", "LZW", "WEBP", "YCbCr JPEG", "ZSTD")
_Stamps = tuple[tuple[str, int, int], ...]
# How a VRT names its rasters: relative to itself or not.
_NAMED = re.compile(r"""<Source(?:Filename|Dataset)\b([^>]*)>([^<]+)<""")
_WHOLE: set[_Stamps] = set()  # found whole by this process: a dry run and each of many cities ask again


def check_whole(path: str) -> None:
    """Raise :class:`SourceError` where a GeoTIFF, or one in a VRT, ends before its pixels do, or shows holes or damage.

    Of one behind an address, the last pixels alone are read. Of a local one, GDAL says where each block of each band
    stands: that is compared with the file's size. A compressed block that begins with zeros is a hole, as a copy that
    never ended leaves; a hole in uncompressed pixels cannot be told from black image. Up to 16 blocks of the bands and
    of a mask of their own are decoded, the last one among them, and the last of each overview. Damage in other blocks,
    and rasters of other formats, are believed. A file found whole is not looked at again by this process until its size
    or time of change differs.
    """
    if address_of(path) != path:
        check_remote(path)
        return
    if path.startswith("/vsi") or not Path(path).is_file():
        return
    for inner in _inner(path):
        if not Path(inner).exists():
            raise SourceError(
                f"{path} is made of {inner}, which is not there.",
                hint="Bring it back, or make the VRT anew.",
                path=path,
            )
        if not Path(inner).is_dir() and not _is_vrt(inner):  # one in another is believed: it may go on for long
            check_whole(inner)
    stamps = _stamps(path)
    if stamps in _WHOLE:
        return
    _check(path)
    _WHOLE.add(stamps)


def lost(path: str) -> str | None:
    """Return a file of this machine that a VRT, or a VRT in it, is made of and that is not there."""
    if not Path(path).is_file():
        return path
    return next((gone for inner in sorted(_inner(path)) if (gone := lost(inner)) is not None), None)


def made_of(path: str) -> set[str]:
    """Return the files of this machine that a VRT, and each VRT in it, is made of; none of other rasters."""
    found: set[str] = set()
    left = [path]
    while left:  # one that is made of itself, too, has an end
        inner = {file for file in _inner(left.pop()) if Path(file).is_file()} - found
        found |= inner
        left += inner
    return found


def _stamps(path: str) -> _Stamps:
    """Return path, size and time of change of a raster and of what GDAL keeps beside it: overviews and a mask."""
    found = []
    for name in (path, f"{path}.ovr", f"{path}.msk"):
        try:
            info = os.stat(name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # a name may have no room for .ovr
                continue
            raise
        found.append((name, info.st_size, info.st_mtime_ns))
    return tuple(found)


def _is_vrt(path: str) -> bool:
    with open(path, "rb") as file:
        return b"<VRTDataset" in file.read(200)


def _inner(path: str) -> Iterator[str]:
    """Yield the files that a VRT is made of, as far as they are named by a path on this machine."""
    if not _is_vrt(path):
        return
    for match in set(_NAMED.findall(Path(path).read_text(encoding="utf-8", errors="replace"))):
        name = unescape(match[1], {"&quot;": '"', "&apos;": "'"})
        if 'relativeToVRT="1"' in match[0]:
            yield str(Path(path).parent / name)
        elif os.path.isabs(name) and not name.startswith("/vsi"):
            yield name


def _check(path: str) -> None:
    with open_raster(path) as source:
        if source.driver != "GTiff":
            return
        overviews = len(source.overviews(1))
        blocks = _blocks(source)
        needed, there = int(blocks.sum(axis=1).max(initial=0)), os.path.getsize(path)
        if needed > there:
            raise SourceError(
                f"{path} is cut off: its pixels reach to {size(needed)} ({needed:,} bytes), and the file ends at "
                f"{size(there)} ({there:,} bytes).",
                hint="Copy or download it again.",
                path=path,
            )
        if source.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION") in _NEVER_ZERO and (holes := _holes(path, blocks)):
            raise SourceError(
                f"{path} is damaged: {holes} of its {len(blocks)} blocks are holes full of zeros.",
                hint="Copy or download it again.",
                path=path,
            )
        _decode_some(source, path, _DECODED)
    for level in range(overviews):
        with open_raster(path, overview_level=level) as source:
            _decode_some(source, path, 1)


def _blocks(source: DatasetReader) -> NDArray[np.int64]:
    """Return where each block of all bands stands and its size, in bytes; blocks never written stand nowhere."""
    found = []
    for band, (height, width) in enumerate(source.block_shapes, 1):
        for y in range(-(-source.height // height)):
            for x in range(-(-source.width // width)):
                start = source.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", band)
                if start is not None:
                    found.append((int(start), int(source.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", band))))
        if source.interleaving and source.interleaving.value == "PIXEL":  # one block holds all bands
            break
    return np.array(found, np.int64).reshape(-1, 2)


def _holes(path: str, blocks: NDArray[np.int64]) -> int:
    """Return how many compressed blocks begin with zeros."""
    with open(path, "rb") as file:

        def begins(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(min(length, _HEAD))

        return sum(1 for start, length in blocks.tolist() if length and not any(begins(start, length)))


def _decode_some(source: DatasetReader, path: str, most: int) -> None:
    """Decode the last block and some before it, as far apart from each other as can be: ``most`` at most."""
    height, width = source.block_shapes[0]
    if height * width * source.count * np.dtype(source.dtypes[0]).itemsize > _MOST_BYTES:
        return
    columns = -(-source.width // width)
    last = columns * -(-source.height // height) - 1
    # Alpha is read as a band; what a nodata value masks is decoded already.
    masked = any(MaskFlags.per_dataset in f and MaskFlags.alpha not in f for f in source.mask_flag_enums)
    for block in np.unique(np.linspace(last, 0, most).round().astype(int)).tolist():
        row, col = block // columns * height, block % columns * width
        window = Window(col, row, min(width, source.width - col), min(height, source.height - row))
        try:
            source.read(window=window)
            if masked:
                source.read_masks(1, window=window)
        except RasterioError:
            which = "its last pixels" if block == last else "some of its pixels"
            raise SourceError(
                f"{path} is damaged: {which} cannot be read.", hint="Copy or download it again.", path=path
            ) from None
