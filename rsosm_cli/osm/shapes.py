"""Points, lines and rings as plain coordinates, which become WKB and boxes without an object for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import KINDS

if TYPE_CHECKING:
    import pyarrow as pa

POINT, LINE, POLYGON = range(len(KINDS))
# Bytes of WKB before the coordinates: byte order, type; of lines the number of points, of polygons that of rings, too.
_HEAD = np.array([5, 9, 13])
_MOST_CORNERS, _FEW = 12, 20  # with more corners GEOS is as quick; and with fewer shapes of as many corners


@dataclass(frozen=True)
class Shapes:
    """``N`` points, lines and polygons of one ring; ``lonlat`` holds their coordinates one after the other."""

    kind: NDArray[np.uint8]  # (N,) index into KINDS
    lengths: NDArray[np.int64]  # (N,) at least 1
    lonlat: NDArray[np.float64]  # (sum of lengths, 2)

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows: NDArray[np.int64]) -> Shapes:
        places = spread((np.cumsum(self.lengths) - self.lengths)[rows], self.lengths[rows])
        return Shapes(self.kind[rows], self.lengths[rows], self.lonlat.take(places, axis=0))

    @cached_property
    def boxes(self) -> NDArray[np.float64]:
        """West, south, east, north of each: (N, 4)."""
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
        # Coordinates stand at any byte: the same memory, seen as 16 bytes from each byte on.
        points = np.ndarray((len(data) - 15,), "V16", data, strides=(1,))
        first = np.cumsum(self.lengths) - self.lengths
        points[np.arange(len(self.lonlat)) * 16 + np.repeat(start + head - 16 * first, self.lengths)] = (
            np.ascontiguousarray(self.lonlat, "<f8").view("V16").reshape(-1)
        )
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


def surely_simple(shapes: Shapes) -> NDArray[np.bool_]:
    """Return which shapes are polygons of few corners whose ring does not touch itself: valid without asking GEOS.

    Most buildings are found so. Of the others nothing is known.
    """
    found = np.zeros(len(shapes), bool)
    starts = np.cumsum(shapes.lengths) - shapes.lengths
    for corners in range(3, _MOST_CORNERS + 1):
        rows = np.flatnonzero((shapes.kind == POLYGON) & (shapes.lengths == corners + 1))
        if len(rows) < _FEW:
            continue
        at = starts[rows] + np.arange(corners)[:, None]
        xy = np.rint(shapes.lonlat.take(at, axis=0) * 1e7).astype(np.int64)  # exact: OSM's fixed point
        ring = np.ascontiguousarray(np.moveaxis(xy - xy[:1], 2, 0))  # (2, corners, F)
        small = np.abs(ring).max(axis=(0, 1)) < 1 << 28  # 27 degrees: what is multiplied below stays below 2 ** 63
        rings = np.concatenate([ring, ring], axis=1)  # twice round, so that a later corner is a later row
        edge = rings[:, 1 : corners + 1] - ring
        edges = np.concatenate([edge, edge], axis=1)
        after = edges[:, 1 : corners + 1]
        # At a corner the ring turns, or goes straight on: it does not go back on itself.
        simple = small & ((_cross(edge, after) != 0) | ((edge * after).sum(axis=0) > 0)).all(axis=0)
        for step in range(2, corners // 2 + 1):
            # Two edges that share no corner are apart where both ends of one lie on one side of the other.
            other, far = edges[:, step : step + corners], rings[:, step : step + corners] - ring
            apart = _cross(edge, far) * 1.0 * _cross(edge, far + other) > 0
            apart |= _cross(other, far) * 1.0 * _cross(other, far - edge) > 0
            simple &= apart.all(axis=0)
        found[rows] = simple
    return found


def _cross(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    return a[0] * b[1] - a[1] * b[0]
