"""Vertices where geometries cross the edges of tiles, so that neighbours are cut alike."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.pairs import ragged

Geometries = NDArray[np.object_]


def noded(geometry: Geometries, rows: NDArray[np.int64], bounds_m: NDArray[np.float64]) -> Geometries:
    """Return geometries ``rows`` (all lines or all polygons) with a vertex wherever they cross the line of a tile's
    edge.

    Where two objects share a segment, cutting each by itself rounds the cut differently (the direction of the segment
    matters), and neighbours that touch come to overlap by 1e-10 m. A vertex put into both at one place, before they are
    cut, leaves nothing to round.
    """
    unique, place = np.unique(rows, return_inverse=True)
    if not len(unique):
        return np.empty(0, dtype=object)
    shape, xy, offsets = shapely.to_ragged_array(geometry[unique])
    lines = np.unique(bounds_m[:, [0, 2]]), np.unique(bounds_m[:, [1, 3]])
    xy, vertices = _insert_crossings(xy, offsets[0], *lines)
    out = shapely.from_ragged_array(shape, xy, (vertices, *offsets[1:]))
    # Arrays of mixed types come back as Multi* all.
    alone = shapely.get_num_geometries(out) == 1
    out[alone] = shapely.get_geometry(out[alone], 0)
    return out[place]


def _insert_crossings(
    xy: NDArray[np.float64], starts: NDArray[np.int64], xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return chains of vertices (V, 2), chain c being ``starts[c] : starts[c + 1]``, with their crossings of lines.

    ``xs`` and ``ys`` (sorted) are the places of vertical and horizontal lines.
    """
    a, b = xy[:-1], xy[1:]
    joined = np.ones(max(len(xy) - 1, 0), bool)
    joined[starts[1:-1] - 1] = False
    # From the lesser end to the greater, so that both directions of a segment round alike.
    swap = (a[:, 0] > b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] > b[:, 1]))
    low, high = np.where(swap[:, None], b, a), np.where(swap[:, None], a, b)
    places, points, shares = [], [], []
    for axis, at in ((0, xs), (1, ys)):
        lesser = np.minimum(low[:, axis], high[:, axis])
        greater = np.maximum(low[:, axis], high[:, axis])
        first = np.searchsorted(at, lesser, side="right")
        counts = np.where(joined, np.maximum(np.searchsorted(at, greater, side="left") - first, 0), 0)
        segment = np.repeat(np.arange(len(counts)), counts)
        line = at[ragged(first, counts)]
        p, q = low[segment], high[segment]
        share = (line - p[:, axis]) / (q[:, axis] - p[:, axis])
        point = p + share[:, None] * (q - p)
        point[:, axis] = line
        places.append(segment)
        points.append(point)
        shares.append(share)
    segment, share, point = np.concatenate(places), np.concatenate(shares), np.concatenate(points)
    # One order along each segment, read backwards where the segment runs from its greater end: ties (a corner, lines a
    # rounding apart) fall alike in both directions.
    rank = np.empty(len(segment), np.int64)
    rank[np.lexsort((share, segment))] = np.arange(len(segment))
    order = np.lexsort((np.where(swap[segment], -rank, rank), segment))
    new_xy = np.insert(xy, segment[order] + 1, point[order], axis=0)
    added = np.r_[0, np.cumsum(np.bincount(segment, minlength=len(xy)))]
    return new_xy, starts + added[np.maximum(starts - 1, 0)]
