"""Mending geometries and cutting them at the edges of tiles, many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.pairs import ragged

Geometries = NDArray[np.object_]

# shapely type ids by dimension of the kind: points, lines, polygons, single and Multi*.
_TYPES = ((0, 4), (1, 5), (3, 6))
_COLLECT = (shapely.multipoints, shapely.multilinestrings, shapely.multipolygons)
# What `get_parts` gives of lines includes rings.
_PART_TYPES = ((0,), (1, 2), (3,))


@dataclass(frozen=True)
class Pieces:
    """Elements cut at the edges of tiles, sorted by (tile, element)."""

    element: NDArray[np.int64]  # (P,)
    tile: NDArray[np.int64]  # (P,)
    geometry: Geometries  # (P,)
    full: NDArray[np.bool_]  # (P,) the piece is the whole tile


def of_kind(geometry: Geometries, kind: int) -> Geometries:
    """Return the parts of dimension ``kind`` of each geometry as one geometry; None where there is none."""
    types = shapely.get_type_id(geometry)
    good = np.isin(types, _TYPES[kind]) & ~shapely.is_empty(geometry)
    out = np.where(good, geometry, None)
    odd = np.flatnonzero(~good & (types == 7))
    if len(odd):
        parts, owner = shapely.get_parts(geometry[odd], return_index=True)
        # A collection may hold Multi*: two steps reach the single parts.
        parts, inner = shapely.get_parts(parts, return_index=True)
        owner = owner[inner]
        wanted = np.isin(shapely.get_type_id(parts), _PART_TYPES[kind]) & ~shapely.is_empty(parts)
        parts, owner = parts[wanted], owner[wanted]
        whole, number = np.unique(owner, return_inverse=True)
        joined = _COLLECT[kind](parts, indices=number) if len(parts) else np.empty(0, object)
        alone = shapely.get_num_geometries(joined) == 1
        joined[alone] = shapely.get_geometry(joined[alone], 0)
        out[odd[whole]] = joined
    return out


def mend(geometry: Geometries, kind: NDArray[np.uint8]) -> tuple[Geometries, NDArray[np.bool_]]:
    """Return valid geometries of each element's kind (None where nothing of it is left), and which were changed.

    Invalid geometries pass through ``make_valid``; of what comes back the parts of the element's kind stay.
    """
    sound = shapely.is_valid(geometry) & ~shapely.is_empty(geometry)
    out = geometry.copy()
    for k in range(3):
        mine = np.flatnonzero(kind == k)
        fine = sound[mine] & np.isin(shapely.get_type_id(geometry[mine]), _TYPES[k])
        bad = mine[~fine]
        if len(bad):
            finite = np.isfinite(shapely.bounds(geometry[bad])).all(axis=1)
            out[bad] = None
            out[bad[finite]] = of_kind(shapely.make_valid(geometry[bad[finite]]), k)
    changed = np.array(out != geometry, dtype=bool)
    return out, changed


def clip(
    geometry: Geometries,
    kind: NDArray[np.uint8],
    bounds_m: NDArray[np.float64],
    own_tile: NDArray[np.int64] | None = None,
) -> Pieces:
    """Return the pieces of valid geometries within each tile, of the element's own dimension.

    ``bounds_m`` (T, 4) west, south, east, north. An element wholly within a tile is its own piece; a tile wholly within
    a polygon is the piece; the rest is cut by ``clip_by_rect``, tile by tile. Points on an edge belong to both tiles. A
    line or polygon that only touches a tile has no length or area there and no piece. With ``own_tile`` (N,) an element
    belongs to that tile alone.
    """
    boxes = shapely.box(*bounds_m.T)
    bounds = shapely.bounds(geometry)
    if own_tile is None:
        element, tile = shapely.STRtree(boxes).query(geometry, predicate="intersects")
    else:
        element = np.flatnonzero(shapely.intersects(geometry, boxes[own_tile]))
        tile = own_tile[element]
    b, t = bounds[element], bounds_m[tile]
    whole = (b[:, 0] >= t[:, 0]) & (b[:, 1] >= t[:, 1]) & (b[:, 2] <= t[:, 2]) & (b[:, 3] <= t[:, 3])
    whole |= kind[element] == 0
    pieces = np.where(whole, geometry[element], None)

    # Only a polygon whose box holds the tile can hold the tile.
    around = (b[:, 0] <= t[:, 0]) & (b[:, 1] <= t[:, 1]) & (b[:, 2] >= t[:, 2]) & (b[:, 3] >= t[:, 3])
    around &= (kind[element] == 2) & ~whole
    rows = np.flatnonzero(around)
    shapely.prepare(geometry[element[rows]])
    filled = rows[shapely.covers(geometry[element[rows]], boxes[tile[rows]])]
    pieces[filled] = boxes[tile[filled]]
    whole[filled] = True

    rows = np.flatnonzero(~whole)
    rows = rows[np.argsort(tile[rows], kind="stable")]
    runs = np.r_[0, np.flatnonzero(np.diff(tile[rows])) + 1, len(rows)]
    cut = _noded(geometry, np.unique(element[rows]), kind, bounds_m)[element[rows]]
    for first, last in pairwise(runs.tolist()):
        if last > first:
            cut[first:last] = shapely.clip_by_rect(cut[first:last], *bounds_m[tile[rows[first]]])
    pieces[rows] = _clean(cut, kind[element[rows]])

    kept = np.flatnonzero(np.array(pieces != None, dtype=bool))  # noqa: E711 elementwise
    kept = kept[np.lexsort((element[kept], tile[kept]))]
    full = np.zeros(len(tile), bool)
    full[filled] = True
    return Pieces(element[kept], tile[kept], pieces[kept], full[kept])


def _noded(
    geometry: Geometries, rows: NDArray[np.int64], kind: NDArray[np.uint8], bounds_m: NDArray[np.float64]
) -> Geometries:
    """Return the geometries, those of ``rows`` with a vertex wherever they cross the line of a tile's edge.

    Where two objects share a segment, cutting each by itself rounds the cut differently (the direction of the segment
    matters), and neighbours that touch come to overlap by 1e-10 m. A vertex put into both at one place, before they are
    cut, leaves nothing to round.
    """
    out = geometry.copy()
    lines = np.unique(bounds_m[:, [0, 2]]), np.unique(bounds_m[:, [1, 3]])
    for k in (1, 2):
        mine = rows[kind[rows] == k]
        if len(mine):
            shape, xy, offsets = shapely.to_ragged_array(geometry[mine])
            xy, vertices = _insert_crossings(xy, offsets[0], *lines)
            noded = shapely.from_ragged_array(shape, xy, (vertices, *offsets[1:]))
            # Arrays of mixed types come back as Multi* all.
            alone = shapely.get_num_geometries(noded) == 1
            noded[alone] = shapely.get_geometry(noded[alone], 0)
            out[mine] = noded
    return out


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
        shares.append(np.where(swap[segment], 1 - share, share))
    segment, share, point = np.concatenate(places), np.concatenate(shares), np.concatenate(points)
    order = np.lexsort((share, segment))
    new_xy = np.insert(xy, segment[order] + 1, point[order], axis=0)
    added = np.r_[0, np.cumsum(np.bincount(segment, minlength=len(xy)))]
    return new_xy, starts + added[np.maximum(starts - 1, 0)]


def _clean(cut: Geometries, kind: NDArray[np.uint8]) -> Geometries:
    """Return valid cut pieces of each one's kind with length or area; None for the rest."""
    sound = shapely.is_valid(cut)
    bad = np.flatnonzero(~sound)
    if len(bad):
        cut[bad] = shapely.make_valid(cut[bad])
    out = np.full(len(cut), None, dtype=object)
    for k in (1, 2):
        mine = kind == k
        out[mine] = of_kind(cut[mine], k)
    size = np.where(kind == 2, shapely.area(out), shapely.length(out))
    return np.where(size > 0, out, None)
