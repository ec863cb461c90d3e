"""Heterographs by example: relations, neighbours, key points, tags, perturbations, mending, cutting."""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
import shapely.affinity
from graph_of import built, elements_of, named_edges

from rsosm_cli.graph.clip import clip
from rsosm_cli.graph.envelopes import corners_of
from rsosm_cli.graph.pairs import meeting_boxes
from rsosm_cli.graph.relations import relation_table
from rsosm_cli.graph.tiles import TileIndex
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.settings import GraphSettings, PerturbSettings, TagSettings


def test_neighbours_that_share_a_slanted_edge_touch_in_every_tile() -> None:
    # Thirds and sevenths are no binary fractions, so every cut of the shared edge rounds.
    a, b = (-1 / 3, -1 / 7), (17 + 1 / 3, 8 + 1 / 7)
    above = shapely.Polygon([a, b, (-1 / 3, 9.1)])
    below = shapely.Polygon([b, a, (17.4, -1 / 7)])
    along = shapely.LineString([b, a])
    # The edges of neighbouring tiles agree to the last digit but one.
    tiles = np.array([[x, y, x + 0.7, y + 0.7] for x in np.arange(0, 16, 0.7) for y in np.arange(0, 8, 0.7)])
    result = built(elements_of([above, below, along]), tiles=tiles)
    between = {r for (_, i, j), r in named_edges(result, "polygon", "polygon").items() if i != j}
    assert between == {"touch"}
    assert set(named_edges(result, "line", "polygon").values()) == {"touch"}


def test_a_polygon_around_the_tile_covers_all_in_it() -> None:
    ground = shapely.box(-5, -5, 30, 30)
    house, wall = shapely.box(1, 1, 2, 2), shapely.LineString([(0, 8), (8, 8)])
    result = built(elements_of([ground, ground.buffer(1), house, wall, shapely.Point(0, 3), shapely.Point(4, 4)]))
    tile_0 = {k[1:]: v for k, v in named_edges(result, "polygon", "polygon").items() if k[0] == 0}
    assert tile_0[0, 1] == tile_0[1, 0] == "equal"
    assert (tile_0[0, 2], tile_0[2, 0]) == ("cover", "cover-by")
    assert named_edges(result, "line", "polygon")[0, 0, 0] == "touch"  # along the edge: interiors do not meet
    points = named_edges(result, "point", "polygon")
    assert (points[0, 0, 0], points[0, 1, 0]) == ("touch", "within")


def test_points_are_joined_within_their_tile_only_and_from_four() -> None:
    points = [shapely.Point(x, y) for x, y in ((1, 1), (2, 5), (6, 3), (9, 1), (10, 6), (14, 2), (15, 7))]
    edges = named_edges(built(elements_of(points)), "point", "point")
    assert all(r == "self" for (t, i, j), r in edges.items() if t == 0)
    assert {(i, j) for (t, i, j), r in edges.items() if t == 1 and r == "delaunay" and i < j} >= {(0, 1), (2, 3)}


def test_positions_are_tile_units_with_v_down() -> None:
    path = shapely.LineString([(0, 8), (0, 4), (8, 4)])
    nodes = built(elements_of([path, shapely.Point(2, 6)])).graphs.nodes
    np.testing.assert_allclose(nodes["point"].key_points, [[[0.25, 0.25]]])
    np.testing.assert_allclose(nodes["line"].key_points[0], [[0.25, 0.5], [0, 0], [1, 0.5]])
    np.testing.assert_allclose(nodes["line"].length[0], 12 / 32)


def test_measures_of_a_polygon() -> None:
    nodes = built(elements_of([shapely.box(2, 2, 6, 4)])).graphs.nodes["polygon"]
    np.testing.assert_allclose(nodes.area, [8 / 64])
    np.testing.assert_allclose(nodes.length, [12 / 32])
    np.testing.assert_allclose(nodes.envelope[0], [[0.25, 0.5], [0.75, 0.5], [0.75, 0.75], [0.25, 0.75]])
    np.testing.assert_allclose(nodes.centroid, [[0.5, 0.625]])


def test_key_points_depend_on_the_element_alone() -> None:
    house = shapely.box(1, 1, 3, 3)
    alone = built(elements_of([house])).graphs.nodes["polygon"].key_points
    crowd = built(elements_of([house, shapely.box(4, 4, 5, 5), shapely.Point(1, 1)])).graphs.nodes["polygon"].key_points
    np.testing.assert_array_equal(alone[0], crowd[0])


def test_broken_geometries_are_mended_or_dropped_and_counted() -> None:
    bow = shapely.Polygon([(1, 1), (3, 3), (3, 1), (1, 3)])
    spike = shapely.Polygon([(5, 5), (6, 6), (5, 5)])
    dot = shapely.LineString([(1, 1), (1, 1)])
    lost = shapely.Point(float("nan"), 1)
    result = built(elements_of([bow, spike, dot, lost, shapely.box(4, 4, 5, 5)]))
    assert (result.counts["mended"], result.counts["dropped"]) == (1, 3)
    np.testing.assert_allclose(result.graphs.nodes["polygon"].area[0], 2 / 64)


def test_tags_follow_the_settings() -> None:
    tags = [
        {"amenity": "school", "name": "A", "source": "survey", "tiger:cfcc": "A41"},
        {"name": "B"},
        {"addr:city": "Porto", "building:use": "retail", "shop": "yes"},
    ]
    elements = elements_of([shapely.Point(i + 1, 1) for i in range(3)], tags)
    plain = Vocabulary.of(elements, TagSettings())
    assert plain.tags == ("amenity:school", "building:use:retail", "shop:yes")
    assert [plain.key_of(i) for i in range(3)] == ["amenity", "building:use", "shop"]
    assert "name:A" in Vocabulary.of(elements, TagSettings(names=True)).tags
    result = built(elements)
    nodes = result.graphs.nodes["point"]
    assert nodes.osm_id.tolist() == [1, 3]
    assert result.counts["untagged"] == 1
    assert nodes.class_code.tolist() == [0, 6]  # amenity, shop
    assert nodes.tag_ids.tolist() == [0, 1, 2]


def test_administrative_boundaries_are_left_out_unless_they_are_something_else() -> None:
    country = {"boundary": "administrative", "admin_level": "2", "type": "boundary"}
    tags = [
        country,
        {**country, "place": "town"},
        {**country, "natural": "coastline"},
        {"boundary": "protected_area"},
        {"boundary": "postal_code"},
    ]
    elements = elements_of([shapely.box(-1e5, -1e5, 1e5, 1e5)] * 5, tags)
    result = built(elements)
    assert result.graphs.nodes["polygon"].osm_id.tolist() == [3, 4, 3, 4]
    assert result.counts["boundaries"] == 3
    assert result.numbers["boundaries"].tolist() == [1 * 4 + 1, 2 * 4 + 1, 5 * 4 + 1]
    all_of_them = built(elements, GraphSettings(leave_out=()))
    assert all_of_them.counts["boundaries"] == 0
    assert all_of_them.graphs.nodes["polygon"].osm_id.tolist() == [1, 2, 3, 4, 5] * 2
    some = built(elements, GraphSettings(leave_out=("boundary=p*",)))
    assert some.graphs.nodes["polygon"].osm_id.tolist() == [1, 2, 3] * 2


def test_texts_that_read_alike_are_one_tag() -> None:
    vocabulary = Vocabulary.from_pairs([("a:b", "c"), ("a", "b:c"), ("a", "d")])
    assert vocabulary.tags == ("a:b:c", "a:d")
    assert vocabulary.keys == ("a:b", "a")
    offsets, ids = vocabulary.encode([{"a": "b:c"}, {"a:b": "c", "x": "y"}])
    assert (offsets.tolist(), ids.tolist()) == ([0, 1, 2], [0, 0])


def test_perturbations_are_seeded_and_independent_of_company() -> None:
    points = [shapely.Point(1 + i % 6, 1 + i // 6) for i in range(36)]
    elements = elements_of(points, [{"shop": "yes"} if i % 2 else {"amenity": "bank"} for i in range(36)])

    def ids(**perturb: Any) -> list[int]:
        graph = GraphSettings(perturb=PerturbSettings(**perturb))
        return built(elements, graph).graphs.nodes["point"].osm_id.tolist()

    half = ids(drop_objects=0.5, seed=3)
    assert 8 < len(half) < 28
    assert ids(drop_objects=0.5, seed=3) == half != ids(drop_objects=0.5, seed=4)
    assert set(ids(drop_objects=0.8, seed=3)) <= set(half)  # a larger share drops more of the same
    assert ids(drop_keys=("sho*",)) == [i for i in range(1, 37) if i % 2]
    still = built(elements).graphs.nodes["point"].key_points
    moved = built(elements, GraphSettings(perturb=PerturbSettings(shift_m=0.5))).graphs.nodes["point"].key_points
    np.testing.assert_allclose(np.linalg.norm((moved - still)[:, 0] * 8, axis=1), 0.5, atol=1e-5)


def test_sweep_finds_every_meeting_pair_of_boxes() -> None:
    rng = np.random.default_rng(1)
    corner = rng.integers(0, 12, (200, 2)).astype(float)
    bounds = np.concatenate([corner, corner + rng.integers(0, 4, (200, 2))], axis=1)
    tile, lone = rng.integers(0, 5, 200), rng.random(200) < 0.3
    p, q = (np.concatenate(x) for x in zip(*meeting_boxes(tile, bounds, lone), strict=True))
    boxes = shapely.box(*bounds.T)
    i, j = np.triu_indices(200, 1)
    meets = (tile[i] == tile[j]) & shapely.intersects(boxes[i], boxes[j]) & ~(lone[i] & lone[j])
    assert set(zip(p.tolist(), q.tolist(), strict=True)) == set(zip(i[meets].tolist(), j[meets].tolist(), strict=True))


def test_no_elements_give_empty_graphs_of_every_type() -> None:
    result = built(elements_of([]))
    assert all(len(n.osm_id) == 0 and len(n.offsets) == 3 for n in result.graphs.nodes.values())
    assert len(result.graphs.edges) == 9


def test_the_table_of_relations_names_every_rule() -> None:
    table = relation_table()
    assert "| line-line | `0********` | cross | cross |" in table
    assert "| polygon-polygon | `T*****FF*` | cover | cover-by |" in table
    assert "overlap" in relation_table("released")


def test_envelopes_are_the_smallest_rectangles() -> None:
    rng = np.random.default_rng(0)
    shapes = [shapely.convex_hull(shapely.MultiPoint(rng.uniform(0, 8, (n, 2)))) for n in (3, 4, 5, 8, 12) * 8]
    shapes += [
        shapely.box(1, 1, 3, 4), shapely.affinity.rotate(shapely.box(1, 1, 3, 4), 30), shapely.box(0, 0, 8, 8),
        shapely.Polygon([(1, 1), (5, 1), (5, 3), (3, 3), (3, 6), (1, 6)]),
        shapely.box(1, 1, 4, 4).difference(shapely.box(2, 2, 3, 3)),
        shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 2, 6, 3)]),
    ]  # fmt: skip
    lines = [shapely.LineString([(1, 1), (4, 5)]), shapely.LineString([(1, 1), (4, 5), (6, 1)])]
    geometry = np.array(shapes + lines, object)
    corners = corners_of(geometry)
    rectangles = shapely.polygons(corners)
    expected = shapely.oriented_envelope(geometry)
    np.testing.assert_allclose(shapely.area(rectangles), shapely.area(expected), rtol=1e-9)
    assert (shapely.area(shapely.difference(geometry, shapely.buffer(rectangles, 1e-9))) == 0).all()
    sides = np.hypot(*np.moveaxis(np.roll(corners, -1, 1) - corners, -1, 0))
    np.testing.assert_allclose(sides[:, :2], sides[:, 2:], atol=1e-9)


def test_tiles_of_a_grid_and_others_are_found_alike() -> None:
    rng = np.random.default_rng(1)
    grid = np.array([[x, y, x + 8.0, y + 8.0] for x in range(0, 64, 8) for y in range(0, 40, 8) if (x + y) % 24])
    corner = np.round(rng.uniform(-10, 70, (300, 2)))  # many on the lines of the grid
    boxes = np.concatenate([corner, corner + rng.integers(0, 20, (300, 2))], axis=1)
    index = TileIndex.of(grid)
    assert index.table is not None
    meet = (boxes[:, None, :2] <= grid[None, :, 2:]).all(2) & (boxes[:, None, 2:] >= grid[None, :, :2]).all(2)
    assert sorted(zip(*index.meeting(boxes), strict=True)) == list(zip(*np.nonzero(meet), strict=True))
    for tiles in (np.concatenate([grid, grid[:1]]), np.concatenate([grid, grid + 4])):
        other = TileIndex.of(tiles)
        assert other.table is None
        meet = (boxes[:, None, :2] <= tiles[None, :, 2:]).all(2) & (boxes[:, None, 2:] >= tiles[None, :, :2]).all(2)
        assert sorted(zip(*other.meeting(boxes), strict=True)) == list(zip(*np.nonzero(meet), strict=True))


def test_wide_and_scattered_shapes_have_pieces_only_where_they_are() -> None:
    tiles = np.array([[x, y, x + 2.0, y + 2.0] for x in range(0, 12, 2) for y in range(0, 12, 2)])
    shapes = [
        shapely.MultiPoint([(1, 1), (11, 11)]),
        shapely.MultiPoint([(1, 1), (3, 1)]),
        shapely.MultiLineString([[(1, 1), (1, 3)], [(9, 9), (11, 11)]]),
        shapely.LineString([(0.5, 0.5), (0.5, 11.5), (11.5, 11.5)]),
        shapely.box(0, 0, 12, 12).difference(shapely.box(1, 1, 11, 11)),  # a frame
        shapely.Polygon([(0, 0), (12, 0), (12, 1), (1, 1), (1, 12), (0, 12)]),
        shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(10, 10, 12, 12)]),
    ]
    geometry, kind = np.array(shapes, object), np.array([0, 0, 1, 1, 2, 2, 2], np.uint8)
    pieces = clip(geometry, kind, tiles)
    cut = shapely.intersection(geometry[:, None], shapely.box(*tiles.T)[None])
    for k, size in enumerate((shapely.get_num_coordinates, shapely.length, shapely.area)):
        expected = {(i, t) for i, t in zip(*np.nonzero(size(cut)), strict=True) if kind[i] == k}
        mine = kind[pieces.element] == k
        assert set(zip(pieces.element[mine], pieces.tile[mine], strict=True)) == expected
    for element, tile, piece in zip(pieces.element, pieces.tile, pieces.geometry, strict=True):
        if kind[element]:  # points stay whole
            assert piece.equals(cut[element, tile])
