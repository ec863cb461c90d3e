"""Mending geometries and cutting them at the edges of tiles, many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph.noding import noded
from rsosm_cli.graph.pairs import ragged
from rsosm_cli.graph.tiles import TileIndex

Geometries = NDArray[np.object_]

# shapely type ids by dimension of the kind: points, lines, polygons, single and Multi*.
_TYPES = ((0, 4), (1, 5), (3, 6))
_COLLECT = (shapely.multipoints, shapely.multilinestrings, shapely.multipolygons)
# What `get_parts` gives of lines includes rings.
_PART_TYPES = ((0,), (1, 2), (3,))
# Tiles that the box of an element meets, up to which cutting it is cheaper than asking whether it meets them itself.
_FEW_TILES = 4


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
    out: Geometries = np.where(good, geometry, np.array(None, dtype=object))
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
    tiles = TileIndex.of(bounds_m)
    bounds = shapely.bounds(geometry)
    if own_tile is None:
        element, tile = tiles.meeting(bounds)
    else:
        element, tile = np.arange(len(geometry)), own_tile
    b, t = bounds[element], bounds_m[tile]
    whole = (b[:, 0] >= t[:, 0]) & (b[:, 1] >= t[:, 1]) & (b[:, 2] <= t[:, 2]) & (b[:, 3] <= t[:, 3])
    # The box of what winds over many tiles meets more of them than it does itself.
    wide = np.bincount(element, minlength=len(geometry)) > _FEW_TILES
    doubtful = ~whole & (wide[element] | (kind[element] == 0) | (own_tile is not None))
    rows = np.flatnonzero(doubtful)
    shapely.prepare(geometry[element[rows]])
    met = ~doubtful
    met[rows] = shapely.intersects(geometry[element[rows]], boxes[tile[rows]])
    element, tile, b, t, whole = element[met], tile[met], b[met], t[met], whole[met]
    whole |= kind[element] == 0
    pieces: Geometries = np.where(whole, geometry[element], np.array(None, dtype=object))

    # Only a polygon whose box holds the tile can hold the tile.
    around = (b[:, 0] <= t[:, 0]) & (b[:, 1] <= t[:, 1]) & (b[:, 2] >= t[:, 2]) & (b[:, 3] >= t[:, 3])
    around &= (kind[element] == 2) & ~whole
    rows = np.flatnonzero(around)
    shapely.prepare(geometry[element[rows]])
    filled = rows[shapely.covers(geometry[element[rows]], boxes[tile[rows]])]
    pieces[filled] = boxes[tile[filled]]
    whole[filled] = True

    rows = np.flatnonzero(~whole & (kind[element] == 2))
    rows = rows[np.argsort(tile[rows], kind="stable")]
    runs = np.r_[0, np.flatnonzero(np.diff(tile[rows])) + 1, len(rows)]
    cut = noded(geometry, element[rows], bounds_m)
    if len(rows):
        rectangles = bounds_m[tile[rows[runs[:-1]]]].tolist()
        for (first, last), rectangle in zip(pairwise(runs.tolist()), rectangles, strict=True):
            cut[first:last] = shapely.clip_by_rect(cut[first:last], *rectangle)
    pieces[rows] = _clean(cut)
    rows = np.flatnonzero(~whole & (kind[element] == 1))
    pieces[rows] = _cut_lines(geometry, element[rows], tile[rows], tiles)

    kept = np.flatnonzero(np.array(pieces != None, dtype=bool))  # noqa: E711 elementwise
    kept = kept[np.lexsort((element[kept], tile[kept]))]
    full = np.zeros(len(tile), bool)
    full[filled] = True
    return Pieces(element[kept], tile[kept], pieces[kept], full[kept])


def _cut_lines(
    geometry: Geometries, element: NDArray[np.int64], tile: NDArray[np.int64], tiles: TileIndex
) -> Geometries:
    """Return the part of line ``element[i]`` within ``tile[i]``, edge included; None where it has no length.

    No segment of a noded line straddles an edge, so its midpoint says on which side it lies. (``clip_by_rect`` would
    drop what runs along the edge.)
    """
    out = np.full(len(element), None, dtype=object)
    if not len(element):
        return out
    lines = np.unique(element)
    parts, owner = shapely.get_parts(noded(geometry, lines, tiles.bounds_m), return_index=True)
    xy, part = shapely.get_coordinates(parts, return_index=True)
    segment = np.flatnonzero((part[1:] == part[:-1]) & (xy[1:] != xy[:-1]).any(axis=1))
    middle = (xy[segment] + xy[segment + 1]) / 2
    found, in_tile = tiles.meeting(np.tile(middle, 2))
    segment = segment[found]
    # Of the tiles of a segment only those asked for.
    wanted = element * len(tiles.bounds_m) + tile
    order = np.argsort(wanted)
    key = lines[owner[part[segment]]] * len(tiles.bounds_m) + in_tile
    row = order[np.minimum(np.searchsorted(wanted, key, sorter=order), len(order) - 1)]
    asked = wanted[row] == key
    segment, row = segment[asked], row[asked]
    if not len(segment):
        return out
    sort = np.lexsort((segment, row))
    segment, row = segment[sort], row[sort]
    # Segments that follow one another are one string; the strings of a line in a tile are one piece.
    first = np.flatnonzero(np.r_[True, (np.diff(segment) != 1) | (row[1:] != row[:-1])])
    counts = np.diff(np.r_[first, len(segment)]) + 1
    places = ragged(segment[first], counts)
    strings = shapely.linestrings(xy[places], indices=np.repeat(np.arange(len(first)), counts))
    cut, group = np.unique(row[first], return_inverse=True)
    joined = shapely.multilinestrings(strings, indices=group)
    alone = shapely.get_num_geometries(joined) == 1
    joined[alone] = shapely.get_geometry(joined[alone], 0)
    out[cut] = joined
    return out


def _clean(cut: Geometries) -> Geometries:
    """Return valid cut polygons with an area; None for the rest."""
    bad = np.flatnonzero(~shapely.is_valid(cut))
    if len(bad):
        cut[bad] = shapely.make_valid(cut[bad])
    out = of_kind(cut, 2)
    return np.where(shapely.area(out) > 0, out, np.array(None, dtype=object))
