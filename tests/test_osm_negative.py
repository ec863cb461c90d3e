"""OSM files with ids below zero, as editors and converters write them, and with objects in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapely
from element_tables import read
from osm_documents import document, node, relation, ring, way

from rsosm_cli.osm import extract
from rsosm_cli.places.extract import place_by_name
from rsosm_cli.places.find import find_place
from rsosm_cli.settings import FetchSettings

SPOTS = ((10.02, 50.02), (10.04, 50.02), (10.04, 50.04), (10.02, 50.04))
NODES = [node(-number, *spot) for number, spot in enumerate(SPOTS, 1)]
HOUSE = shapely.Polygon(SPOTS)


@pytest.mark.parametrize("threshold", [0, extract.LARGE])
def test_objects_below_zero_are_read_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
    monkeypatch.setattr(extract, "LARGE", threshold)
    parts = [
        *NODES,
        node(-9, 10.03, 50.03, shop="yes"),
        way(-1, [-1, -2, -3, -4, -1], building="yes"),
        way(-2, [100, -1], highway="path"),
        way(7, [-1, 100, 101], highway="track"),
        way(8, [100, 999], highway="track"),
        way(-3, [100, -999], highway="track"),
    ]
    found, counts = read(tmp_path, document(*parts))
    assert set(found) == {("node", -9), ("way", -1), ("way", -2), ("way", 7)}
    assert found["way", -1][0] == "polygon"
    assert found["way", -1][2].equals(HOUSE)
    assert found["way", 7][2].coords[0] == SPOTS[0]
    assert counts.cut == 2
    assert found == read(tmp_path, document(*reversed(parts)))[0]  # ways before their nodes


def test_multipolygons_below_zero(tmp_path: Path) -> None:
    parts = [
        *NODES,
        way(-1, [-1, -2, -3]),  # libosmium wants -1 before -2, JOSM writes -2 before -1: all orders below
        way(-2, [-3, -4, -1]),
        way(5, ring(0, 0, 3)),
        relation(-7, [(-1, "outer"), (-2, "outer"), (5, "outer")], type="multipolygon", natural="water"),
    ]
    for order in (parts, [*parts[:4], parts[5], parts[4], *parts[6:]], parts[::-1]):
        found, counts = read(tmp_path, document(*order))
        assert set(found) == {("relation", -7)}
        assert found["relation", -7][2].area == pytest.approx(HOUSE.area + 9e-6)
        assert counts.cut == 0


def test_members_of_multipolygons_in_any_order_and_twice(tmp_path: Path) -> None:
    ways = [way(3, ring(6, 6, 2)), way(1, ring(0, 0, 2)), way(2, ring(3, 3, 2))]
    wood = relation(9, [(1, "outer"), (2, "outer"), (3, "outer")], type="multipolygon", landuse="forest")
    other = relation(4, [(1, "outer")], type="multipolygon", leisure="park")
    for parts in ([*ways, wood, other], [*ways, ways[0], wood, other]):
        found, _ = read(tmp_path, document(*parts))
        assert set(found) == {("relation", 9), ("relation", 4)}
        assert shapely.get_num_geometries(found["relation", 9][2]) == 3


def test_a_boundary_below_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.osm"
    admin = {"type": "boundary", "boundary": "administrative"}
    lines = [
        way(-1, [-1, -2, -3]),
        way(-2, [-3, -4, -1]),
        relation(-7, [(-1, "outer"), (-2, "outer")], name="Neu", **admin),
    ]
    path.write_text(document(*NODES, *lines), encoding="utf-8")
    assert place_by_name("Neu", [path]).geometry.equals(HOUSE)
    assert find_place("Neu", files=[path], osm_id="R-7", settings=FetchSettings(), offline=True).osm_id == "R-7"
