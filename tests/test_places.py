"""City name to boundary: from extracts, from files and boxes."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import pytest
import shapely
from osm_documents import document, relation, ring, way

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.places import find
from rsosm_cli.places.extract import names_of, place_by_id, place_by_name
from rsosm_cli.places.find import find_place
from rsosm_cli.places.given import place_of_box, place_of_extract, place_of_file
from rsosm_cli.places.place import Place, read_place, write_place
from rsosm_cli.settings import FetchSettings

ADMIN = {"type": "boundary", "boundary": "administrative"}


def extract(tmp_path: Path, *parts: str) -> Path:
    path = tmp_path / "town.osm"
    path.write_text(document(*parts), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["Liechtenstein", "liechtenstein", "LIECHTENSTEIN ", "Лихтенштейн"])
def test_liechtenstein_in_any_script(shared: Path, name: str) -> None:
    found = place_by_name(name, [shared / "data/osm/liechtenstein.osm.pbf"])
    assert found.osm_id == "R1155955"
    assert found.admin_level == 2
    assert found.country == "LI"
    assert found.area_km2 == pytest.approx(160.5, abs=1)  # 160.5 km² officially


@pytest.mark.parametrize("name", ["Andorra", "andorra", "Андорра", "アンドラ"])
def test_andorra_in_any_script(shared: Path, name: str) -> None:
    found = place_by_name(name, [shared / "data/osm/andorra.osm.pbf"])
    assert found.area_km2 == pytest.approx(468, rel=0.01)


def test_of_nested_namesakes_the_lowest_level_is_taken_and_said(shared: Path) -> None:
    found = place_by_name("Andorra la Vella", [shared / "data/osm/andorra.osm.pbf"])
    assert (found.osm_id, found.admin_level) == ("R2804753", 7)
    assert "admin_level 7) is taken; inside it lies" in found.notes[1]


@pytest.mark.parametrize(
    ("name", "file", "relation_id"),
    [("Monaco", "monaco", "R1124039"), ("Porto", "porto", "R"), ("Helsinki", "helsinki-centre", "R34914")],
)
def test_a_boundary_that_the_extract_cuts_is_never_guessed_at(
    shared: Path, name: str, file: str, relation_id: str
) -> None:
    with pytest.raises(MissingError, match=f"The boundary of .*{relation_id}.* is cut by {file}") as error:
        place_by_name(name, [shared / f"data/osm/{file}.osm.pbf"])
    for way_out in ("--boundary FILE", "--bbox", "--boundary extract", "--osm-id"):
        assert way_out in str(error.value)


def test_what_is_chosen_is_said_with_id_level_country_and_area(shared: Path, tmp_path: Path) -> None:
    found = place_by_name("Vaduz", [shared / "data/osm/liechtenstein.osm.pbf"])
    assert found.country == "LI"
    assert found.notes == ("Vaduz is Vaduz (R1155956, admin_level 8, LI, 17.3 km²) of liechtenstein.osm.pbf.",)


@pytest.mark.parametrize(
    ("tags", "around", "country"),
    [
        ({"ISO3166-2": "DE-BY"}, {}, "DE"),
        ({"addr:country": "de"}, {}, "DE"),
        ({"ISO3166-1": "276"}, {}, ""),  # the number of a country is none of its codes
        ({}, {"admin_level": "2", "ISO3166-1:alpha2": "CH"}, "CH"),
        ({}, {"admin_level": "4", "ISO3166-2": "CH-ZH"}, "CH"),
        ({"ISO3166-1": "LI"}, {"admin_level": "2", "ISO3166-1": "CH"}, "LI"),
        ({}, {"admin_level": "2"}, ""),
    ],
)
def test_the_country_of_a_boundary(tmp_path: Path, tags: dict[str, str], around: dict[str, str], country: str) -> None:
    names = {key.replace(":", "__"): value for key, value in tags.items()}
    outer = {key.replace(":", "__"): value for key, value in around.items()}
    path = extract(
        tmp_path,
        way(1, ring(1, 1, 3)),
        way(2, ring(0, 0, 6)),
        way(3, ring(7, 7, 2)),
        relation(1, [(1, "outer")], name="Stadt", admin_level="8", **names, **ADMIN),
        relation(2, [(2, "outer")], name="Land", **outer, **ADMIN),
        relation(3, [(3, "outer")], name="Anderswo", admin_level="2", **{"ISO3166-1": "AT"}, **ADMIN),
        relation(4, [(2, "outer"), (99, "outer")], name="Cut", admin_level="2", **{"ISO3166-1": "FR"}, **ADMIN),
    )
    assert place_by_name("Stadt", [path]).country == country
    assert place_by_id("Stadt", 1, [path]).country == country


def test_a_boundary_that_lists_a_way_twice_and_one_of_a_single_node(tmp_path: Path) -> None:
    members = [(1, "outer"), (2, "outer"), (1, "outer"), (3, "outer"), (4, "outer")]
    path = extract(
        tmp_path,
        way(1, [100, 104, 144]),
        way(2, [144, 140, 100]),
        way(3, [155]),
        way(4, []),
        relation(1, members, name="Stadt", **ADMIN),
    )
    assert place_by_name("Stadt", [path]).geometry.area == pytest.approx(16e-6)
    lone = extract(tmp_path, way(3, [155]), relation(1, [(3, "outer")], name="Stadt", **ADMIN))
    with pytest.raises(MissingError, match="is not closed"):
        place_by_name("Stadt", [lone])


def test_an_unknown_name_offers_a_known_one(shared: Path) -> None:
    with pytest.raises(MissingError, match="Did you mean Vaduz"):
        place_by_name("Vadutz", [shared / "data/osm/liechtenstein.osm.pbf"])


def test_namesakes_side_by_side_are_listed(tmp_path: Path) -> None:
    path = extract(
        tmp_path,
        way(1, ring(0, 0, 3)),
        way(2, ring(5, 5, 3)),
        relation(1, [(1, "outer")], name="Neustadt", admin_level="8", **ADMIN),
        relation(2, [(2, "outer")], name="Neustadt", admin_level="8", **ADMIN),
    )
    with pytest.raises(UsageError, match=r"2 boundaries.*R1, admin_level 8.*R2, admin_level 8") as error:
        place_by_name("Neustadt", [path])
    assert error.value.data["candidates"] == ["R1", "R2"]
    found = find_place("Neustadt", files=[path], osm_id="r2", settings=FetchSettings(), offline=True)
    assert found.osm_id == "R2"


def test_namesakes_of_different_level_side_by_side_are_listed_too(tmp_path: Path) -> None:
    path = extract(
        tmp_path,
        way(1, ring(0, 0, 3)),
        way(2, ring(5, 5, 3)),
        relation(1, [(1, "outer")], name="Neustadt", admin_level="6", **ADMIN),
        relation(2, [(2, "outer")], alt_name="Altstadt;Neustadt", admin_level="8", **ADMIN),
    )
    with pytest.raises(UsageError, match="2 boundaries"):
        place_by_name("neustadt", [path])
    assert place_by_name("ALTSTADT", [path]).osm_id == "R2"


def test_boundaries_of_several_ways_with_exclaves_and_holes(tmp_path: Path) -> None:
    start = [100, 104, 144]
    path = extract(
        tmp_path,
        way(1, start),
        way(2, [144, 140, 100]),
        way(3, ring(1, 1, 2)),
        way(4, ring(6, 6, 2)),
        relation(1, [(1, "outer"), (2, "outer"), (3, "inner"), (4, "outer"), (4, "label")], name="Stadt", **ADMIN),
    )
    found = place_by_name("Stadt", [path])
    assert found.geometry.area == pytest.approx((16 - 4 + 4) * 1e-6)
    assert found.geometry.geom_type == "MultiPolygon"


def test_a_boundary_that_does_not_close(tmp_path: Path) -> None:
    path = extract(tmp_path, way(1, [100, 104, 144]), relation(1, [(1, "outer")], name="Stadt", **ADMIN))
    with pytest.raises(MissingError, match="is not closed"):
        place_by_name("Stadt", [path])


def test_a_boundary_cut_in_one_file_is_found_whole_in_another(tmp_path: Path) -> None:
    whole = extract(tmp_path, way(1, ring(0, 0, 3)), relation(1, [(1, "outer")], name="Stadt", **ADMIN))
    cut = tmp_path / "cut.osm"
    cut.write_text(document(relation(1, [(1, "outer")], name="Stadt", **ADMIN)))
    assert place_by_name("Stadt", [cut, whole]).source == "town.osm"
    with pytest.raises(MissingError, match=r"relation/7 is not in cut\.osm or town\.osm\. Give --boundary FILE"):
        place_by_id("Stadt", 7, [cut, whole])


def test_a_way_as_the_boundary(tmp_path: Path) -> None:
    path = extract(
        tmp_path, way(1, ring(0, 0, 3), name="Hof", addr__country="DE"), way(2, [100, 101, 999]), way(3, [100, 104])
    )
    known = {"files": [path], "settings": FetchSettings(), "offline": True}
    found = find_place("Stadt", osm_id="way/1", **known)  # type: ignore[arg-type]
    assert (found.osm_id, found.country, found.source) == ("W1", "DE", "town.osm")
    assert found.geometry.area == pytest.approx(9e-6)
    assert found.notes[0].startswith("Stadt is Hof (W1, DE, ")
    for number, said in ((2, r"way 2 \(W2\) is cut by"), (3, "is not closed in"), (-4, "way/-4 is not in town.osm")):
        with pytest.raises(MissingError, match=said):
            find_place("Stadt", osm_id=f"way/{number}", **known)  # type: ignore[arg-type]


def test_the_table_of_cities_serves_extracts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"stadt": "R2", "dorf": "R3"}
    monkeypatch.setattr(find, "known_id", lambda name: known.get(name.casefold()))
    path = extract(
        tmp_path,
        way(1, ring(0, 0, 3)),
        way(2, ring(5, 5, 3)),
        relation(1, [(1, "outer")], name="Stadt", admin_level="8", **ADMIN),
        relation(2, [(2, "outer")], name="Stadt", admin_level="8", **ADMIN),
        relation(3, [(2, "outer")], name="Weiler", admin_level="8", **ADMIN),
        relation(4, [(1, "outer")], name="Dorf", admin_level="8", **ADMIN),
    )
    assert find_place("Stadt", files=[path], settings=FetchSettings(), offline=True).osm_id == "R2"
    assert find_place("Dorf", files=[path], settings=FetchSettings(), offline=True).osm_id == "R4"  # R3 is another


def test_names() -> None:
    tags = {"name": "München", "name:zh": "慕尼黑", "alt_name": "Minga; Monaco di Baviera", "website": "x"}
    assert names_of(tags) == {"münchen", "慕尼黑", "minga", "monaco di baviera"}


class TestGiven:
    def test_a_file_in_another_crs(self, tmp_path: Path) -> None:
        squares = [
            shapely.box(500_000, 4_649_776, 501_000, 4_650_776),
            shapely.box(502_000, 4_649_776, 503_000, 4_650_776),
        ]
        gpd.GeoDataFrame(geometry=squares, crs="EPSG:32629").to_file(tmp_path / "b.gpkg")
        found = place_of_file("Town", tmp_path / "b.gpkg")
        assert found.area_km2 == pytest.approx(2, rel=0.01)
        assert "2 polygons" in found.notes[0]

    def test_files_that_are_no_boundary(self, tmp_path: Path) -> None:
        with pytest.raises(MissingError, match="no boundary file"):
            place_of_file("Town", tmp_path / "none.geojson")
        gpd.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs=4326).to_file(tmp_path / "p.geojson")
        with pytest.raises(UsageError, match="holds no polygon"):
            place_of_file("Town", tmp_path / "p.geojson")
        for layer in ("east", "west"):
            square = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs=4326)
            square.to_file(tmp_path / "l.gpkg", layer=layer)
        with pytest.raises(FormatError, match=r"l\.gpkg has several layers: east, west"):
            place_of_file("Town", tmp_path / "l.gpkg")
        (tmp_path / "t.geojson").write_text("{")
        with pytest.raises(FormatError, match="damaged"):
            place_of_file("Town", tmp_path / "t.geojson")
        gpd.GeoDataFrame(geometry=[shapely.box(5e5, 4e6, 6e5, 5e6)], crs=4326).to_file(tmp_path / "m.geojson")
        with pytest.raises(UsageError, match="leaves the globe"):
            place_of_file("Town", tmp_path / "m.geojson")

    @pytest.mark.parametrize(
        "bbox", [(1, 2, 1, 3), (3, 2, 1, 4), (0, -91, 1, 1), (170, 0, 190, 1), (0, 0, float("nan"), 1)]
    )
    def test_boxes_that_are_none(self, bbox: tuple[float, float, float, float]) -> None:
        with pytest.raises(UsageError, match="--bbox"):
            place_of_box("Town", bbox)

    def test_a_box_in_another_order_is_put_right_in_the_hint(self) -> None:
        with pytest.raises(UsageError, match=r"latitude before longitude\? Then write 114 22 115 23"):
            place_of_box("Town", (22, 114, 23, 115))
        with pytest.raises(UsageError, match=r"west and east swapped\? Then write 1\.5 42\.5 1\.6 42\.6"):
            place_of_box("Town", (1.6, 42.5, 1.5, 42.6))
        with pytest.raises(UsageError, match=r"west, east, south, north\? Then write 85.51 27.62 85.54 27.65"):
            place_of_box("Town", (85.51, 85.54, 27.62, 27.65))

    @pytest.mark.parametrize("east", [-179.98, 180.02])
    def test_a_box_across_the_180th_meridian(self, east: float) -> None:
        with pytest.raises(UsageError, match=r"both sides of the 180th meridian.*two sides as two cities") as error:
            place_of_box("Town", (179.98, -17, east, -16.9))
        for side in ("179.9800 -17.0000 180.0000 -16.9000", "-180.0000 -17.0000 -179.9800 -16.9000"):
            assert f"--bbox {side}" in str(error.value)
        with pytest.raises(UsageError, match="west below east"):  # mixed up
            place_of_box("Town", (10, 50, -10, 51))

    def test_a_place_across_the_180th_meridian(self, tmp_path: Path) -> None:
        fiji = [shapely.box(177, -19, 180, -16), shapely.box(-180, -19, -178, -15)]
        gpd.GeoDataFrame(geometry=fiji, crs=4326).to_file(tmp_path / "fiji.geojson")
        with pytest.raises(UsageError, match=r"Fiji \(fiji.geojson\) lies on both sides.*177.*180.*-180.*-178"):
            place_of_file("Fiji", tmp_path / "fiji.geojson")
        # France beyond the seas is as wide, and the shorter way round is not across.
        spread = [shapely.box(x, -20, x + 4, -16) for x in (-178, -150, -62, -2, 55, 164)]
        gpd.GeoDataFrame(geometry=spread, crs=4326).to_file(tmp_path / "spread.geojson")
        assert place_of_file("Spread", tmp_path / "spread.geojson").geometry.bounds[2] == 168

    def test_a_box_of_half_the_world(self) -> None:
        with pytest.raises(UsageError, match=r"Town \(--bbox\) is 360 degrees wide, more than half the world"):
            place_of_box("Town", (-180, -90, 180, 90))

    def test_a_tiny_box(self) -> None:
        with pytest.raises(UsageError, match="encloses only"):
            place_of_box("Town", (10, 50, 10.0001, 50.0001))

    def test_the_box_of_an_extract(self, shared: Path) -> None:
        found = place_of_extract("Porto", [shared / "data/osm/porto.osm.pbf"])
        assert found.geometry.bounds == pytest.approx((-8.6212353, 41.1247318, -8.5936815, 41.1560755))
        with pytest.raises(UsageError, match="needs a file"):
            place_of_extract("Porto", [])

    @pytest.mark.parametrize("geometry", [[], [None, shapely.Point()]], ids=["no rows", "no shapes"])
    def test_files_without_objects_have_no_box(self, tmp_path: Path, geometry: list[object]) -> None:
        frame = gpd.GeoDataFrame({"a": range(len(geometry))}, geometry=geometry, crs=4326)
        frame.to_file(tmp_path / "e.gpkg")
        frame.to_parquet(tmp_path / "e.parquet")
        (tmp_path / "e.osm").write_text('<osm version="0.6"></osm>')
        for name in ("e.gpkg", "e.parquet", "e.osm"):
            with pytest.raises(FormatError, match=f"{name} holds no objects"):
                place_of_extract("Town", [tmp_path / name])

    def test_the_box_of_nodes_of_a_large_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rsosm_cli.osm.extract.LARGE", 1000)
        monkeypatch.setattr("rsosm_cli.osm.extract._COUNTED", 7)  # nodes come in portions
        path = extract(tmp_path)
        assert path.stat().st_size > 1000
        assert place_of_extract("Town", [path]).geometry.bounds == pytest.approx((10, 50, 10.009, 50.009))

    def test_two_answers_to_one_question(self) -> None:
        with pytest.raises(UsageError, match="--boundary and --bbox both say"):
            find_place("Town", boundary="extract", bbox=(0, 0, 1, 1), settings=FetchSettings())


def test_a_place_goes_round(tmp_path: Path) -> None:
    place_ = Place("臺北", shapely.box(121, 25, 121.1, 25.1), "Nominatim", "R1", 4, "TW")
    write_place(tmp_path / "place.geojson", place_)
    again = read_place(tmp_path / "place.geojson")
    assert again.geometry.equals(place_.geometry)
    assert (again.name, again.osm_id, again.admin_level, again.country) == ("臺北", "R1", 4, "TW")
    feature = json.loads((tmp_path / "place.geojson").read_text(encoding="utf-8"))["features"][0]
    assert feature["properties"]["area_km2"] == pytest.approx(place_.area_km2)
    (tmp_path / "bad.geojson").write_text("[]")
    with pytest.raises(FormatError, match="not a place"):
        read_place(tmp_path / "bad.geojson")
    with pytest.raises(MissingError):
        read_place(tmp_path / "none.geojson")
