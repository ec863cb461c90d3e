"""Points, lines and rings as plain coordinates, which become WKB and boxes without an object for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import KINDS

if TYPE_CHECKING:
    import pyarrow as pa

POINT, LINE, POLYGON = range(len(KINDS))
# Bytes of WKB before the coordinates: byte order, type; of lines the number of points, of polygons that of rings, too.
_HEAD = np.array([5, 9, 13])


@dataclass(frozen=True)
class Shapes:
    """``N`` points, lines and polygons of one ring; ``lonlat`` holds their coordinates one after the other."""

    kind: NDArray[np.uint8]  # (N,) index into KINDS
    lengths: NDArray[np.int64]  # (N,) at least 1
    lonlat: NDArray[np.float64]  # (sum of lengths, 2)

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: NDArray[np.int64]) -> Shapes:
        wanted = self.lonlat[spread((np.cumsum(self.lengths) - self.lengths)[rows], self.lengths[rows])]
        return Shapes(self.kind[rows], self.lengths[rows], wanted)

    def boxes(self) -> NDArray[np.float64]:
        """Return west, south, east, north of each: (N, 4)."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.concatenate([least.reduceat(self.lonlat, starts) for least in (np.minimum, np.maximum)], axis=1)

    def wkb(self) -> pa.BinaryArray:
        """Return each as WKB: https://www.ogc.org/standard/sfa/, section 8.2 (little endian)."""
        import pyarrow as pa

        head = _HEAD[self.kind]
        offsets = np.concatenate([[0], np.cumsum(head + 16 * self.lengths)])
        data = np.zeros(offsets[-1], np.uint8)
        start = offsets[:-1]
        data[start] = 1
        data[start + 1] = self.kind + 1
        data[start[self.kind == POLYGON] + 5] = 1
        counted = np.flatnonzero(self.kind != POINT)
        counts = self.lengths[counted].astype("<u4").view(np.uint8).reshape(-1, 4)
        data[(start + head)[counted, None] + np.arange(-4, 0)] = counts
        rest = np.ones(len(data), bool)
        rest[spread(start, head)] = False
        data[rest] = np.ascontiguousarray(self.lonlat, "<f8").view(np.uint8).reshape(-1)
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
        return pa.BinaryArray.from_buffers(pa.binary(), len(self), buffers)

    def objects(self) -> NDArray[np.object_]:
        """Return them as shapely's geometries."""
        import shapely

        found = np.full(len(self), None, dtype=object)
        for kind, make in ((POINT, _points), (LINE, shapely.linestrings), (POLYGON, shapely.linearrings)):
            rows = np.flatnonzero(self.kind == kind)
            if len(rows):
                part = self if len(rows) == len(self) else self[rows]
                made = make(part.lonlat, indices=np.repeat(np.arange(len(part)), part.lengths))
                found[rows] = shapely.polygons(made) if kind == POLYGON else made
        return found


def _points(lonlat: NDArray[np.float64], indices: NDArray[np.int64]) -> NDArray[np.object_]:
    import shapely

    return shapely.points(lonlat)


def spread(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``starts[i]``, ``starts[i] + 1``, ... (``sizes[i]`` of them) for all i."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)
