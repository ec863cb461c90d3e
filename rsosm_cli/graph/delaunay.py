"""Neighbours among the points of a tile."""

from __future__ import annotations

from itertools import pairwise

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
    counts = np.diff(offsets)
    joined = counts >= MIN_POINTS
    if fallback:
        found = _with_fallback(np.repeat(np.arange(len(counts)), counts), joined, position)
    else:
        found = [_released(position[i:j]) + i for i, j in zip(offsets[:-1][joined], offsets[1:][joined], strict=True)]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
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


def _with_fallback(
    tile: NDArray[np.int64], joined: NDArray[np.bool_], position: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Return lists of pairs (n, 2) of the points of the ``joined`` tiles; ``tile`` (N,) ascending."""
    order = np.lexsort((position[:, 1], position[:, 0], tile))
    order = order[joined[tile[order]]]
    ordered, of = position[order], tile[order]
    again = (of[1:] == of[:-1]) & (ordered[1:] == ordered[:-1]).all(axis=1)
    found = [np.stack([order[:-1], order[1:]], axis=1)[again]]  # points at one place
    # The places in node order, so that Qhull sees them as SciPy would see distinct points.
    distinct = np.sort(order[np.r_[True, ~again]]) if len(order) else order
    cuts = np.r_[0, np.flatnonzero(np.diff(tile[distinct])) + 1, len(distinct)] if len(order) else np.zeros(1, np.int64)
    for first, last in pairwise(cuts.tolist()):
        places = distinct[first:last]
        found.append(places[_of_places(position[places])])
    return found


def _of_places(xy: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return pairs (n, 2) of distinct places that are neighbours."""
    if len(xy) < 3:
        return np.arange(len(xy), dtype=np.int64)[None] if len(xy) == 2 else np.empty((0, 2), np.int64)
    try:
        triangulation = Delaunay(xy)
    except QhullError:
        # On a line the order by x, then y, is the order along it.
        along = np.lexsort((xy[:, 1], xy[:, 0]))
        return np.stack([along[:-1], along[1:]], axis=1)
    left_out = triangulation.coplanar[:, [0, 2]].astype(np.int64)
    return np.concatenate([_triangulation_pairs(triangulation), left_out])
