"""Whether a GeoTIFF is all there: a copy or download that broke off still opens, as its header stands in front."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsosm_cli.errors import SourceError
from rsosm_cli.imagery.raster import open_raster
from rsosm_cli.units import size

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# TIFF 6.0, section 2, and BigTIFF: numbers of tags, and the types that offsets and counts may have.
_STRIPS, _TILES, _INNER = (273, 279), (324, 325), 330
_TYPES = {3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
_MOST_PICTURES = 1_000  # overviews and masks of one file; more is a chain that leads back to itself
_MOST_BYTES = 64 << 20  # of a block that is decoded


def check_whole(path: str) -> None:
    """Raise :class:`SourceError` where a local GeoTIFF ends before its pixels do, or its last blocks are damaged.

    Of every picture in it (bands, overviews, masks) the places of all blocks are compared with the file's size, and the
    last block is decoded. Other rasters, and the blocks in between, are believed.
    """
    if path.startswith("/vsi") or not Path(path).is_file():
        return
    with open_raster(path) as source:
        if source.driver != "GTiff":
            return
        overviews = len(source.overviews(1))
        needed, there = _end(Path(path)), os.path.getsize(path)
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


def _end(path: Path) -> int:
    """Return where the last block of a TIFF ends, in bytes; 0 where this cannot be told."""
    with path.open("rb") as file:
        start = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(start[:2])
        if order is None:
            return 0
        big = int(np.frombuffer(start, order + "u2", 1, 2)[0]) == 43
        layout = _Layout(order, 8 if big else 4)
        first = int(np.frombuffer(start, f"{order}u{layout.width}", 1, 8 if big else 4)[0])
        ends = [0]
        for entries in layout.pictures(file, first):
            for places, counts in (_STRIPS, _TILES):
                if places in entries and counts in entries:
                    at, length = (layout.values(file, entries[tag]) for tag in (places, counts))
                    if len(at) == len(length) and len(at):
                        ends.append(int((at + length)[length > 0].max(initial=0)))  # blocks without bytes are empty
        return max(ends)


@dataclass(frozen=True)
class _Entry:
    type: int
    count: int
    content: bytes  # the values, or where they are


@dataclass(frozen=True)
class _Layout:
    """How numbers stand in a TIFF: byte order, and bytes of an offset (4, in BigTIFF 8)."""

    order: str
    width: int

    def pictures(self, file: BinaryIO, first: int) -> Iterator[dict[int, _Entry]]:
        """Yield the entries of every picture of the file by their tags."""
        waiting = [first]
        seen: set[int] = set()
        while waiting and len(seen) < _MOST_PICTURES:
            at = waiting.pop()
            if at in seen or not at:
                continue
            seen.add(at)
            file.seek(at)
            number = self._number(file.read(8 if self.width == 8 else 2))
            one = 4 + 2 * self.width
            table = file.read(number * one)
            entries = {}
            for start in range(0, len(table) - one + 1, one):
                tag, kind = np.frombuffer(table, self.order + "u2", 2, start).tolist()
                count = self._number(table[start + 4 : start + 4 + self.width])
                entries[tag] = _Entry(kind, count, table[start + 4 + self.width : start + one])
            following = self._number(file.read(self.width))
            if _INNER in entries:
                waiting += self.values(file, entries[_INNER]).tolist()
            waiting.append(following)
            yield entries

    def values(self, file: BinaryIO, entry: _Entry) -> NDArray[np.int64]:
        if entry.type not in _TYPES:
            return np.empty(0, np.int64)
        kind = np.dtype(self.order + _TYPES[entry.type])
        content, needed = entry.content, entry.count * kind.itemsize
        if needed > self.width:
            file.seek(self._number(content))
            content = file.read(needed)
        return np.frombuffer(content[: len(content) // kind.itemsize * kind.itemsize], kind)[: entry.count].astype(
            np.int64
        )

    def _number(self, content: bytes) -> int:
        return int.from_bytes(content, "little" if self.order == "<" else "big")
