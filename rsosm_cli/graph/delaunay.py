"""Neighbours among the points of a tile."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

# GeoLink joins points only where a tile has more than three of them.
MIN_POINTS = 4


def delaunay_pairs(
    offsets: NDArray[np.int64], position: NDArray[np.float64], *, fallback: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return pairs (p, q), p < q, of point numbers that are Delaunay neighbours within their tile.

    ``offsets`` (T + 1,), ``position`` (N, 2) tile units in float64: near the origin, since in absolute metres Qhull
    loses edges to rounding. On distinct points that span an area these are the edges of
    :class:`scipy.spatial.Delaunay`. Points at one place are joined in a chain in node order, the first of them
    standing for the place. Distinct places on one line are joined in their order along it. What Qhull leaves out of
    its triangulation as too close to a neighbour is joined to that neighbour. So the points of a tile are always
    connected. Without ``fallback``, as the released code: all points as they are, and none joined where Qhull refuses.
    """
    found: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
    for tile in np.flatnonzero(np.diff(offsets) >= MIN_POINTS):
        first, last = offsets[tile], offsets[tile + 1]
        xy = position[first:last]
        pairs = _with_fallback(xy) if fallback else _released(xy)
        found.append(pairs + first)
    pairs = np.concatenate(found)
    pairs.sort(axis=1)
    # One number a pair, so that duplicates go in one sort of integers.
    n = max(len(position), 1)
    unique = np.unique(pairs[:, 0] * n + pairs[:, 1])
    return unique // n, unique % n


def _triangulation_pairs(triangulation: Delaunay) -> NDArray[np.int64]:
    simplices = triangulation.simplices
    return np.concatenate([simplices[:, [0, 1]], simplices[:, [1, 2]], simplices[:, [0, 2]]]).astype(np.int64)


def _released(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    try:
        return _triangulation_pairs(Delaunay(xy))
    except QhullError:
        return np.empty((0, 2), np.int64)


def _with_fallback(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    order = np.lexsort((np.arange(len(xy)), xy[:, 1], xy[:, 0]))
    ordered = xy[order]
    again = (ordered[1:] == ordered[:-1]).all(axis=1)
    chain = np.stack([order[:-1], order[1:]], axis=1)
    same_place = chain[again]
    # The places in node order, so that Qhull sees them as SciPy would see distinct points.
    places = np.sort(order[np.r_[True, ~again]])
    distinct = xy[places]
    if len(places) < 3:
        joined = places[None, :] if len(places) == 2 else np.empty((0, 2), np.int64)
        return np.concatenate([same_place, joined])
    try:
        triangulation = Delaunay(distinct)
    except QhullError:
        # On a line the order by x, then y, is the order along it.
        along = places[np.lexsort((distinct[:, 1], distinct[:, 0]))]
        return np.concatenate([same_place, np.stack([along[:-1], along[1:]], axis=1)])
    pairs = _triangulation_pairs(triangulation)
    left_out = triangulation.coplanar[:, [0, 2]].astype(np.int64)
    return np.concatenate([same_place, places[pairs], places[left_out]])
