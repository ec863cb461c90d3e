"""What holds of the graph of any shapes: relations, order of input, pieces, Delaunay neighbours, key points."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
from graph_of import CONVERSE, TILES, built, elements_of, named_edges
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import Delaunay

from rsosm_cli.graph.clip import clip, mend
from rsosm_cli.graph.delaunay import delaunay_pairs
from rsosm_cli.graph.keypoints import polygon_points, unit_draws
from rsosm_cli.graph.schema import NODE_TYPES

# Coordinates on a coarse lattice that reaches beyond the tiles: shared edges, collinear overlaps, touching corners and
# identical shapes come up by themselves.
lattice = st.integers(-4, 20).map(lambda v: v * 1.0)
height = st.integers(-3, 11).map(lambda v: v * 1.0)
place = st.tuples(lattice, height)


@st.composite
def polygon(draw: Any) -> Any:
    x, y = draw(place)
    w, h = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    box = shapely.box(x, y, x + w, y + h)
    shape = draw(st.sampled_from(["box", "triangle", "hole", "pinched", "multi", "bow", "sliver", "touching"]))
    if shape == "triangle":
        return shapely.Polygon([(x, y), (x + w, y), (x, y + h)])
    if shape == "hole" and w > 2 and h > 2:
        return box.difference(shapely.box(x + 1, y + 1, x + w - 1, y + h - 1))
    if shape == "pinched" and w > 2:  # a hole that meets the shell in a point
        return shapely.Polygon(box.exterior.coords, [[(x, y), (x + 1, y + h / 2), (x + 2, y + h / 2)]])
    if shape == "multi":
        return shapely.MultiPolygon([box, shapely.box(x + w + 1, y, x + w + 2, y + h)])
    if shape == "bow":  # crosses itself: mended before it is related
        return shapely.Polygon([(x, y), (x + w, y + h), (x + w, y), (x, y + h)])
    if shape == "sliver":
        return shapely.Polygon([(x, y), (x + w, y + h), (x + w, y + h + 2**-20)])
    if shape == "touching":  # a ring that meets itself in a point
        return shapely.Polygon([(x, y), (x + w, y), (x + 1, y + 1), (x + w, y + 2), (x, y + 2), (x + 1, y + 1)])
    return box


@st.composite
def chain(draw: Any) -> Any:
    places = draw(st.lists(place, min_size=2, max_size=5))
    ending = draw(st.sampled_from(["open", "ring", "still", "back"]))
    if ending == "ring":
        places.append(places[0])
    elif ending == "still":  # a segment of no length
        places.append(places[-1])
    elif ending == "back":  # walks its last segment twice
        places.append(places[-2])
    return shapely.LineString(places)


@st.composite
def line(draw: Any) -> Any:
    if draw(st.integers(0, 3)):
        return draw(chain())
    return shapely.MultiLineString(draw(st.lists(chain(), min_size=1, max_size=3)))


points = st.one_of(place.map(shapely.Point), st.lists(place, min_size=1, max_size=3).map(shapely.MultiPoint))


@st.composite
def crowd(draw: Any) -> list[Any]:
    """Shapes with copies among them: the same, begun elsewhere and turned round, beside it, scaled off the lattice."""
    shapes = draw(st.lists(st.one_of(polygon(), line(), points), min_size=2, max_size=7))
    for which in draw(st.lists(st.integers(0, len(shapes) - 1), max_size=3)):
        one = shapes[which]
        how = draw(st.sampled_from(["same", "turned", "beside", "thirds"]))
        if how == "turned":
            one = shapely.reverse(shapely.normalize(one))
        elif how == "beside":
            one = shapely.affinity.translate(one, shapely.bounds(one)[2] - shapely.bounds(one)[0])
        elif how == "thirds":
            one = shapely.affinity.scale(one, 1 / 3, 1 / 7, origin=(0, 0))
        shapes.append(one)
    return shapes


def oracle(a: str, b: str, p: Any, q: Any) -> str | None:
    """Return the relation by shapely's predicates, which the builder does not use."""
    if not p.intersects(q):
        return None
    if p.touches(q):
        return "touch"
    if a == "point":
        return "within"
    if a != b:
        return "cover-by" if p.covered_by(q) else "cross"
    if p.equals(q):
        return "equal"
    if p.covers(q):
        return "cover"
    if p.covered_by(q):
        return "cover-by"
    return "cross" if p.crosses(q) else "overlap"


@settings(max_examples=60, deadline=None)
@given(crowd())
def test_relations_are_those_of_the_cut_geometries(shapes: list[Any]) -> None:
    elements = elements_of(shapes)
    result = built(elements)
    geometry, _ = mend(elements.geometry, elements.kind)
    there = np.array([g is not None for g in geometry])
    kind = elements.kind[there]
    pieces = clip(geometry[there], kind, TILES)
    kind = kind[pieces.element]
    for number_a, a in enumerate(NODE_TYPES):
        for number_b in range(max(number_a, 1), 3):
            b = NODE_TYPES[number_b]
            expected = {}
            for tile in range(2):
                first, second = (pieces.geometry[(pieces.tile == tile) & (kind == k)] for k in (number_a, number_b))
                for i, p in enumerate(first):
                    for j, q in enumerate(second):
                        name = "self" if a == b and i == j else oracle(a, b, p, q)
                        if name is not None:
                            expected[tile, i, j] = name
            assert named_edges(result, a, b) == expected
            back = {(t, j, i): CONVERSE.get(r, r) for (t, i, j), r in expected.items()}
            assert named_edges(result, b, a) == back


@settings(max_examples=30, deadline=None)
@given(crowd(), st.randoms(use_true_random=False))
def test_order_of_input_does_not_matter(shapes: list[Any], random: Any) -> None:
    elements = elements_of(shapes)
    rows = list(range(len(elements)))
    random.shuffle(rows)
    shuffled = replace(
        elements,
        osm_type=elements.osm_type[rows], osm_id=elements.osm_id[rows], kind=elements.kind[rows],
        tags=[elements.tags[i] for i in rows], geometry=elements.geometry[rows],
    )  # fmt: skip
    one, other = built(elements).graphs, built(shuffled).graphs
    for name in NODE_TYPES:
        for field in ("osm_id", "key_points", "tag_ids", "area", "length", "envelope", "centroid", "class_code"):
            np.testing.assert_array_equal(getattr(one.nodes[name], field), getattr(other.nodes[name], field))
    for pair, edges in one.edges.items():
        np.testing.assert_array_equal(edges.index, other.edges[pair].index)
        np.testing.assert_array_equal(edges.relation, other.edges[pair].relation)


@settings(max_examples=40, deadline=None)
@given(polygon(), line())
def test_pieces_are_the_intersections(area: Any, path: Any) -> None:
    geometry, _ = mend(np.array([area, path], dtype=object), np.array([2, 1], np.uint8))
    for kind, whole in ((2, geometry[0]), (1, geometry[1])):
        if whole is None or (kind == 1 and not whole.is_simple):
            continue  # an intersection counts once what a line walks twice
        pieces = clip(np.array([whole], dtype=object), np.array([kind], np.uint8), TILES)
        for tile in range(2):
            expected = whole.intersection(shapely.box(*TILES[tile]))
            found = [g for g, t in zip(pieces.geometry, pieces.tile, strict=True) if t == tile]
            measure = shapely.area if kind == 2 else shapely.length
            assert sum(map(measure, found)) == pytest.approx(measure(expected), abs=1e-9)
            assert all(shapely.is_valid(g) and shapely.get_dimensions(g) == kind for g in found)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=4, max_size=40))
def test_delaunay_pairs_are_scipys(places: set[tuple[int, int]]) -> None:
    xy = np.array(sorted(places)) / 1000 + np.random.default_rng(0).uniform(0, 1e-4, (len(places), 2))
    p, q = delaunay_pairs(np.array([0, len(xy)]), xy)
    triangles = Delaunay(xy)
    expected = {tuple(sorted((int(a), int(b)))) for s in triangles.simplices for a in s for b in s if a < b}
    if not len(triangles.coplanar):
        assert set(zip(p.tolist(), q.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=14))
def test_duplicate_and_collinear_points_are_connected(places: list[tuple[int, int]]) -> None:
    xy = np.array(places) / 4.0
    n = len(xy)
    p, q = delaunay_pairs(np.array([0, n]), xy)
    assert (p < q).all()
    count, _ = connected_components(coo_matrix((np.ones(len(p)), (p, q)), shape=(n, n)), directed=False)
    assert count == 1
    again = delaunay_pairs(np.array([0, n]), xy)
    np.testing.assert_array_equal(np.stack([p, q]), np.stack(again))


@settings(max_examples=50, deadline=None)
@given(st.lists(polygon(), min_size=1, max_size=6))
def test_key_points_of_polygons_lie_inside(shapes: list[Any]) -> None:
    geometry, _ = mend(np.array(shapes, dtype=object), np.full(len(shapes), 2, np.uint8))
    geometry = geometry[[g is not None and g.area > 1e-3 for g in geometry]]
    centroid = shapely.get_coordinates(shapely.centroid(geometry))
    points = polygon_points(geometry, centroid, unit_draws(np.arange(len(geometry)), 3))
    assert points.shape == (len(geometry), 4, 2)
    inside = shapely.distance(shapely.points(points[:, :3]), geometry[:, None]) if len(geometry) else np.zeros(1)
    assert (inside < 1e-9).all()
    np.testing.assert_array_equal(points[:, 3], centroid)
