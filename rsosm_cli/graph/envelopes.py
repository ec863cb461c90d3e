"""Minimum rotated rectangles of pieces, in tile units."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Convex rings of so many different vertices at most are turned here, all at once; GEOS does the rest.
_MOST_VERTICES = 8


def corners_of(geometry: NDArray[np.object_]) -> Floats:
    """Return (N, 4, 2) corners of the minimum rotated rectangle of lines or polygons, in their CRS, in a round.

    Of a straight line it is the line twice.
    """
    bounds = shapely.bounds(geometry)
    corners = np.stack([bounds[:, [0, 1]], bounds[:, [0, 3]], bounds[:, [2, 3]], bounds[:, [2, 1]]], axis=1)
    xy, owner = shapely.get_coordinates(geometry, return_index=True)
    count = np.bincount(owner, minlength=len(geometry))
    first = np.cumsum(count) - count
    types = shapely.get_type_id(geometry)
    segment = (types == 1) & (count == 2)
    corners[segment, :2] = xy[first[segment]][:, None]
    corners[segment, 2:] = xy[first[segment] + 1][:, None]
    # A polygon that fills its box (a whole tile, most of all) is its own envelope.
    box = (bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1])
    left = ~segment & ~((types == 3) & (shapely.area(geometry) == box))
    one_ring = left & (types == 3) & (shapely.get_num_interior_rings(geometry) == 0)
    for m in range(3, _MOST_VERTICES + 1):
        rows = np.flatnonzero(one_ring & (count == m + 1))
        if len(rows):
            ring = xy[first[rows] + np.arange(m)[:, None]]  # (m, n, 2)
            found, convex = _turned(ring)
            rows = rows[convex]
            corners[rows] = found[convex]
            left[rows] = False
    rows = np.flatnonzero(left)
    found, owner = shapely.get_coordinates(shapely.oriented_envelope(geometry[rows]), return_index=True)
    counts = np.bincount(owner, minlength=len(rows))
    first = np.cumsum(counts) - counts
    # Rings have five places, straight lines two: the fourth corner of a line is its first place again.
    for corner in range(4):
        corners[rows, corner] = found[first + np.where(counts >= 5, corner, corner // 2 * (counts - 1))]
    return corners


def _turned(ring: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return (n, 4, 2) the smallest rectangle with a side along an edge of each ring (m, n, 2), and which are convex.

    The smallest rectangle round a convex polygon has a side along one of its edges (Freeman and Shapira, 1975).
    """
    origin = ring[0]
    x, y = np.moveaxis(ring - origin, -1, 0)  # (m, n) near the origin, for the precision of products
    step_x, step_y = np.roll(x, -1, 0) - x, np.roll(y, -1, 0) - y
    turn = step_x * np.roll(step_y, -1, 0) - step_y * np.roll(step_x, -1, 0)
    length = np.hypot(step_x, step_y)
    convex = ((turn > 0).all(axis=0) | (turn < 0).all(axis=0)) & (length > 0).all(axis=0)
    length[:, ~convex] = 1.0
    ux, uy = step_x / length, step_y / length
    best = np.full(x.shape[1], np.inf)
    corners = np.empty((4, 2, x.shape[1]))
    for k in range(len(ring)):
        along, across = x * ux[k] + y * uy[k], y * ux[k] - x * uy[k]
        low, high, near, far = along.min(axis=0), along.max(axis=0), across.min(axis=0), across.max(axis=0)
        area = (high - low) * (far - near)
        # Parallel edges give one rectangle, up to rounding: the first is taken.
        better = area < best * (1 - 1e-12)
        best[better] = area[better]
        for corner, (s, t) in enumerate(((low, near), (low, far), (high, far), (high, near))):
            corners[corner, 0, better] = (s * ux[k] - t * uy[k])[better]
            corners[corner, 1, better] = (s * uy[k] + t * ux[k])[better]
    return corners.transpose(2, 0, 1) + origin[:, None], convex
