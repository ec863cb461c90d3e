"""OSM elements and tiles in, heterographs out: one pass over all tiles at once (GeoLink, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from rsosm_cli.graph import keypoints, relations
from rsosm_cli.graph.admit import left_out
from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.clip import clip, mend
from rsosm_cli.graph.delaunay import delaunay_pairs
from rsosm_cli.graph.envelopes import corners_of
from rsosm_cli.graph.pairs import meeting_boxes, ragged
from rsosm_cli.graph.perturb import element_numbers, perturb, take
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.graph.vocabulary import CLASS_KEYS, Vocabulary
from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import GraphSettings

# Vertices of a piece, times the pairs it is first of, from which an index of it saves more than it costs (measured).
_PREPARED_FROM = 60

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Built:
    """Graphs of tiles, and what happened to the elements on the way.

    ``counts``: `elements` that came in, `mended`, `dropped` (nothing valid of their kind was left), `boundaries` (left
    out as ``leave_out`` says), `untagged` (no tag of the vocabulary), `pieces` (nodes). ``numbers`` are those elements,
    as ``osm_id * 4 + osm_type``, so that blocks that share elements can count each once.
    """

    graphs: GraphArrays
    counts: dict[str, int]
    numbers: dict[str, Ints]


@dataclass(frozen=True)
class _Nodes:
    """Pieces of all kinds, sorted by (kind, tile, element); ``start`` (4,) where each kind begins."""

    kind: NDArray[np.uint8]
    tile: Ints
    element: Ints
    geometry: NDArray[np.object_]
    full: NDArray[np.bool_]
    start: Ints

    def of(self, kind: int) -> slice:
        return slice(int(self.start[kind]), int(self.start[kind + 1]))


def build_graphs(
    elements: Elements,
    bounds_m: Floats,
    settings: GraphSettings,
    vocabulary: Vocabulary,
    tile: Ints | None = None,
) -> Built:
    """Return the heterographs of ``T`` tiles with ``bounds_m`` (T, 4) in the CRS of the elements.

    Nodes come in the order (type, tile, osm_type, osm_id), edges row by row, so the order of the elements does not
    matter. Elements with no tag of the vocabulary are left out, and so are those of ``settings.leave_out``. ``tile``
    (N,) ties each element to one tile, where tiles have objects of their own (chips).
    """
    elements, tile, (tag_offsets, tag_ids), numbers = _prepare(elements, settings, vocabulary, tile)
    pieces = clip(elements.geometry, elements.kind, bounds_m, tile)
    kind = elements.kind[pieces.element]
    order = np.argsort(kind, kind="stable")
    start = np.searchsorted(kind[order], np.arange(4))
    nodes = _Nodes(
        kind[order], pieces.tile[order], pieces.element[order], pieces.geometry[order], pieces.full[order], start
    )
    number = element_numbers(elements)
    classes = _class_codes(tag_offsets, tag_ids, vocabulary)
    centroid = shapely.get_coordinates(shapely.centroid(nodes.geometry))
    arrays = {}
    for k, name in enumerate(NODE_TYPES):
        here = nodes.of(k)
        element, geometry = nodes.element[here], nodes.geometry[here]
        bounds = bounds_m[nodes.tile[here]]
        draws = keypoints.unit_draws(number[element], 3)
        points = _key_points(k, geometry, centroid[here], draws, settings)
        counts = np.diff(tag_offsets)[element]
        area, length = _sizes(k, geometry, bounds)
        arrays[name] = NodeArrays(
            offsets=_offsets(nodes.tile[here], len(bounds_m)),
            osm_type=elements.osm_type[element],
            osm_id=elements.osm_id[element],
            tag_offsets=np.r_[0, np.cumsum(counts)],
            tag_ids=tag_ids[ragged(tag_offsets[:-1][element], counts)],
            key_points=to_tile(points, bounds).astype(np.float32),
            area=area,
            length=length,
            envelope=_envelopes(k, geometry, centroid[here], bounds),
            centroid=to_tile(centroid[here], bounds).astype(np.float32),
            class_code=classes[element],
        )
    edges = _edges(nodes, {k: arrays[name].offsets for k, name in enumerate(NODE_TYPES)}, centroid, bounds_m, settings)
    met = {name: len(found) for name, found in numbers.items()}
    return Built(GraphArrays(arrays, edges), {**met, "pieces": len(nodes.tile)}, numbers)


def to_tile(points: Floats, bounds: Floats) -> Floats:
    """Return points (N, ..., 2) in the CRS as tile units of each one's tile, ``bounds`` (N, 4): u right, v down."""
    box = bounds.reshape(len(bounds), *([1] * (points.ndim - 2)), 4)
    u = (points[..., 0] - box[..., 0]) / (box[..., 2] - box[..., 0])
    v = (box[..., 3] - points[..., 1]) / (box[..., 3] - box[..., 1])
    return np.stack([u, v], axis=-1)


def _prepare(
    elements: Elements, settings: GraphSettings, vocabulary: Vocabulary, tile: Ints | None
) -> tuple[Elements, Ints | None, tuple[Ints, NDArray[np.int32]], dict[str, Ints]]:
    """Return the elements perturbed, sorted, mended and tagged, with their tiles (if tied to any) and their tags.

    Last come the numbers of those that were changed or left out.
    """
    elements, rows = perturb(elements, settings.perturb)
    tile = None if tile is None else tile[rows]
    order = np.lexsort((elements.kind, elements.osm_id, elements.osm_type))
    if (order[1:] < order[:-1]).any():
        elements = take(elements, order)
        tile = None if tile is None else tile[order]
    every = number = element_numbers(elements)
    unwanted = left_out(elements.tags, settings.leave_out)
    if unwanted.any():
        wanted = np.flatnonzero(~unwanted)
        elements, number = take(elements, wanted), every[wanted]
        tile = None if tile is None else tile[wanted]
    offsets, ids = vocabulary.encode(elements.tags)
    counts = np.diff(offsets)
    geometry, changed = mend(elements.geometry, elements.kind)
    lost = np.array(geometry == None, dtype=bool)  # noqa: E711 elementwise
    numbers = {
        "elements": every,
        "mended": number[changed & ~lost],
        "dropped": number[lost],
        "boundaries": every[unwanted],
        "untagged": number[(counts == 0) & ~lost],
    }
    kept = np.flatnonzero((counts > 0) & ~lost)
    tags = (np.r_[0, np.cumsum(counts[kept])], ids[ragged(offsets[:-1][kept], counts[kept])])
    # Nodes need no tag texts from here on.
    whole = Elements(
        elements.crs, elements.osm_type[kept], elements.osm_id[kept], elements.kind[kept], [], geometry[kept]
    )
    return whole, (None if tile is None else tile[kept]), tags, numbers


def _offsets(group: Ints, n: int) -> Ints:
    """Return (n + 1,) offsets of a sorted array of group numbers."""
    return np.r_[0, np.cumsum(np.bincount(group, minlength=n))].astype(np.int64)


def _class_codes(tag_offsets: Ints, tag_ids: NDArray[np.int32], vocabulary: Vocabulary) -> NDArray[np.int16]:
    """Return the first class key of each element's tags (every element has a tag), -1 for none."""
    if not len(tag_ids):
        return np.empty(0, np.int16)
    first = np.minimum.reduceat(vocabulary.class_codes[tag_ids], tag_offsets[:-1])
    return np.where(first < len(CLASS_KEYS), first, -1).astype(np.int16)


def _key_points(
    kind: int, geometry: NDArray[np.object_], centroid: Floats, draws: Floats, settings: GraphSettings
) -> Floats:
    released = settings.key_points == "released"
    if kind == 0:
        return centroid[:, None, :]
    if kind == 1:
        return keypoints.line_points(geometry, centroid if released else None)
    if released:
        return keypoints.released_polygon_points(geometry, centroid, draws)
    return keypoints.polygon_points(geometry, centroid, draws)


def _sizes(kind: int, geometry: NDArray[np.object_], bounds: Floats) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return area and length (of a polygon: of its rings) as shares of the tile's area and perimeter."""
    if kind == 0:
        zero = np.zeros(len(geometry), np.float32)
        return zero, zero
    width, height = bounds[:, 2] - bounds[:, 0], bounds[:, 3] - bounds[:, 1]
    area = shapely.area(geometry) / (width * height)
    length = shapely.length(geometry) / (2 * (width + height))
    return area.astype(np.float32), length.astype(np.float32)


def _envelopes(kind: int, geometry: NDArray[np.object_], centroid: Floats, bounds: Floats) -> NDArray[np.float32]:
    """Return (N, 4, 2) corners of the minimum rotated rectangle in tile units, clockwise from the highest, left one.

    Of a straight line it is the line twice; of a point the point four times.
    """
    corners = corners_of(geometry) if kind > 0 else np.repeat(centroid[:, None, :], 4, axis=1)
    corners = to_tile(corners, bounds)
    # One order for all versions of GEOS: clockwise on the image (v grows downwards), from the highest corner.
    x, y = corners[..., 0], corners[..., 1]
    turned = (np.roll(y, -1, 1) * x - np.roll(x, -1, 1) * y).sum(axis=1) < 0
    corners[turned] = corners[turned, ::-1]
    shares = np.round(corners, 9)  # equal heights differ in the last digits
    highest = np.lexsort((shares[..., 0], shares[..., 1]), axis=1)[:, 0] if len(corners) else np.empty(0, np.int64)
    turn = (highest[:, None] + np.arange(4)) % 4
    return np.take_along_axis(corners, turn[..., None], axis=1).astype(np.float32)


def _edges(
    nodes: _Nodes, offsets: dict[int, Ints], centroid: Floats, bounds_m: Floats, settings: GraphSettings
) -> dict[tuple[str, str], EdgeArrays]:
    """Return the edges of all nine pairs; each list row by row, the self loops of points last."""
    released = settings.relations == "released"
    first, second, relation = _related(nodes, settings)
    n_tiles = len(bounds_m)
    kind_a, kind_b = nodes.kind[first], nodes.kind[second]
    edges: dict[tuple[str, str], EdgeArrays] = {}
    for a, name_a in enumerate(NODE_TYPES):
        for b in range(a, 3):
            name_b = NODE_TYPES[b]
            base_a, base_b = int(nodes.start[a]), int(nodes.start[b])
            if a == b == 0:
                here = nodes.of(0)
                position = to_tile(centroid[here], bounds_m[nodes.tile[here]])
                p, q = delaunay_pairs(offsets[0], position, fallback=not released)
                r = np.full(len(p), relations.DELAUNAY, np.uint8)
            else:
                mine = (kind_a == a) & (kind_b == b)
                p, q, r = first[mine] - base_a, second[mine] - base_b, relation[mine]
            back = relations.converse(r)
            if a == b:
                own = np.arange(nodes.start[a + 1] - base_a)
                loop = np.full(len(own), relations.SELF, np.uint8)
                source, target = np.r_[p, q, own], np.r_[q, p, own]
                names = np.r_[r, back, loop]
                edges[name_a, name_b] = _edge_arrays(
                    name_a, name_b, source, target, names, nodes.tile[nodes.of(a)], offsets[a], offsets[b], n_tiles
                )
            else:
                edges[name_a, name_b] = _edge_arrays(
                    name_a, name_b, p, q, r, nodes.tile[nodes.of(a)], offsets[a], offsets[b], n_tiles
                )
                edges[name_b, name_a] = _edge_arrays(
                    name_b, name_a, q, p, back, nodes.tile[nodes.of(b)], offsets[b], offsets[a], n_tiles
                )
    return edges


def _edge_arrays(
    source_type: str,
    target_type: str,
    source: Ints,
    target: Ints,
    names: NDArray[np.uint8],
    tile_of: Ints,
    offsets_source: Ints,
    offsets_target: Ints,
    n_tiles: int,
) -> EdgeArrays:
    tile = tile_of[source]
    if source_type == target_type == "point":
        # As the published lists: the neighbours row by row, then the self loops.
        order = np.lexsort((target, source, names == relations.SELF, tile))
    else:
        # Nodes are tile-major, so one number sorts by tile, source and target.
        order = np.argsort(source * max(int(offsets_target[-1]), 1) + target, kind="stable")
    source, target, tile = source[order], target[order], tile[order]
    index = np.stack([source - offsets_source[tile], target - offsets_target[tile]]).astype(np.int32)
    column = relations.columns(source_type, target_type, names[order])
    return EdgeArrays(_offsets(tile, n_tiles), index, column)


def _related(nodes: _Nodes, settings: GraphSettings) -> tuple[Ints, Ints, NDArray[np.uint8]]:
    """Return the pairs of pieces that share a point, other than two points, with their relation."""
    bounds = shapely.bounds(nodes.geometry)
    sizes = shapely.get_num_coordinates(nodes.geometry)
    firsts, seconds, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for p, q in meeting_boxes(nodes.tile, bounds, nodes.kind == 0):
        matrix, row = _matrices(nodes, p, q, bounds, sizes)
        relation = np.zeros(len(p), np.uint8)
        pair = nodes.kind[p] * 3 + nodes.kind[q]
        for a, name_a in enumerate(NODE_TYPES):
            for b in range(max(a, 1), 3):
                mine = np.flatnonzero(pair == a * 3 + b)
                named = relations.classify(name_a, NODE_TYPES[b], matrix, settings.relations)
                relation[mine] = named[row[mine]]
        kept = relation != relations.NONE
        firsts.append(p[kept])
        seconds.append(q[kept])
        found.append(relation[kept])
    shapely.destroy_prepared(nodes.geometry)
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(found)


def _matrices(nodes: _Nodes, p: Ints, q: Ints, bounds: Floats, sizes: Ints) -> tuple[relations.Matrix, Ints]:
    """Return the DE-9IM matrices (m, 9) that pairs of pieces of one tile have, and (n,) which of them each has.

    A tile's polygon is never first of another kind. Against a piece that is the whole tile, everything off the tile's
    edge lies within: the matrix need not be computed (those of :mod:`relations` stand for it, alike wherever a rule
    reads them). For the rest GEOS relates.
    """
    forms = np.concatenate(
        [relations.WITHIN_FORMS, relations.transposed(relations.WITHIN_FORMS), relations.EQUAL_FORM[None]]
    )
    row = np.full(len(p), -1)
    some = np.flatnonzero(nodes.full[p] | nodes.full[q])
    for inner, outer, first in ((p[some], q[some], 0), (q[some], p[some], 3)):
        edge, here = bounds[outer], bounds[inner]
        off_edge = (here[:, :2] > edge[:, :2]).all(axis=1) & (here[:, 2:] < edge[:, 2:]).all(axis=1)
        within = nodes.full[outer] & (row[some] < 0) & (off_edge | (nodes.kind[inner] == 2))
        row[some[within]] = np.where(nodes.full[inner], 6, first + nodes.kind[inner])[within]
    rows = np.flatnonzero(row < 0)
    swapped, rows = _prepared(nodes.geometry, p[rows], q[rows], sizes, rows)
    a, b = np.where(swapped, q[rows], p[rows]), np.where(swapped, p[rows], q[rows])
    texts = shapely.relate(nodes.geometry[a], nodes.geometry[b]).tolist()
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    found = np.fromiter(map(number.__getitem__, texts), np.int64, len(texts))
    row[rows] = len(forms) + found + np.where(swapped, len(number), 0)
    related = relations.matrices(list(number))
    return np.concatenate([forms, related, relations.transposed(related)]), row


def _prepared(
    geometry: NDArray[np.object_], p: Ints, q: Ints, sizes: Ints, rows: Ints
) -> tuple[NDArray[np.bool_], Ints]:
    """Prepare the pieces that are worth it; return which pairs to relate the other way round, and all in what order.

    GEOS keeps an index of its first geometry: that is the piece with most to do, vertices times pairs, and its pairs
    follow one another while the index is in the cache. Without an index the smaller piece goes first.
    """
    work = np.bincount(p, minlength=len(sizes)) + np.bincount(q, minlength=len(sizes))
    work *= sizes
    swapped = work[q] > work[p]
    first = np.where(swapped, q, p)
    indexed = np.bincount(first, minlength=len(sizes)) * sizes > _PREPARED_FROM
    shapely.prepare(geometry[indexed])
    swapped = np.where(indexed[first], swapped, sizes[q] < sizes[p])
    order = np.argsort(first, kind="stable")
    return swapped[order], rows[order]
