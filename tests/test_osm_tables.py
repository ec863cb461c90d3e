"""The element table, and vector files that become one."""

from __future__ import annotations

import logging
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely
from element_tables import write_elements

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.osm import vectors as vectors_module
from rsosm_cli.osm.elements import OSM_TYPES, Elements, read_elements
from rsosm_cli.osm.extract import read_extract
from rsosm_cli.osm.sink import ElementSink
from rsosm_cli.osm.vectors import read_vector_elements
from rsosm_cli.places.given import place_of_extract


def elements(n: int = 40_000) -> Elements:
    rng = np.random.default_rng(0)
    lonlat = rng.uniform((-9, 41), (-8, 42), (n, 2))
    return Elements(
        crs="EPSG:4326",
        osm_type=np.zeros(n, np.uint8),
        osm_id=np.arange(n, dtype=np.int64),
        kind=np.zeros(n, np.uint8),
        tags=[{"amenity": f"kind {i % 7}"} for i in range(n)],
        geometry=shapely.points(lonlat),
    )


class TestElements:
    def test_bounds_read_only_what_meets_them(self, tmp_path: Path) -> None:
        path = tmp_path / "osm.parquet"
        whole = elements()
        write_elements(path, whole)
        bounds = (-8.52, 41.5, -8.5, 41.51)
        part = read_elements(path, bounds=bounds)
        inside = shapely.intersects(shapely.box(*bounds), whole.geometry)
        assert part.osm_id.tolist() == whole.osm_id[inside].tolist()
        assert part.tags == [whole.tags[i] for i in np.flatnonzero(inside)]
        assert pq.ParquetFile(path).num_row_groups == 5

    def test_another_crs(self, tmp_path: Path) -> None:
        path = tmp_path / "osm.parquet"
        write_elements(path, elements(1000))
        whole = read_elements(path, "EPSG:32629")
        assert shapely.total_bounds(whole.geometry)[1] > 4_500_000
        west, south, east, north = 530_000.0, 4_560_000.0, 545_000.0, 4_590_000.0
        part = read_elements(path, "EPSG:32629", (west, south, east, north))
        inside = shapely.intersects(shapely.box(west, south, east, north), whole.geometry)
        assert set(whole.osm_id[inside]) <= set(part.osm_id)

    def test_equal_elements_give_equal_bytes(self, tmp_path: Path) -> None:
        for name in "ab":
            write_elements(tmp_path / name, elements(500))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_no_elements_at_all(self, tmp_path: Path) -> None:
        write_elements(tmp_path / "osm.parquet", elements(0))
        assert len(read_elements(tmp_path / "osm.parquet")) == 0
        assert len(read_elements(tmp_path / "osm.parquet", "EPSG:32629", (0, 0, 1, 1))) == 0

    def test_geopandas_reads_it(self, tmp_path: Path) -> None:
        write_elements(tmp_path / "osm.parquet", elements(10))
        frame = gpd.read_parquet(tmp_path / "osm.parquet", bbox=(-9, 41, -8, 42))
        assert len(frame) == 10
        assert frame.crs.to_epsg() == 4326 or frame.crs.to_string() == "OGC:CRS84"
        assert set(frame.columns) >= {"osm_type", "osm_id", "kind", "tags", "geometry"}

    def test_what_is_no_element_table_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 nonsense")
        with pytest.raises(FormatError, match="not a readable Parquet"):
            read_elements(tmp_path / "broken.parquet")
        gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(0, 0)], crs=4326).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(FormatError, match="'osm_type' is missing"):
            read_elements(tmp_path / "a.parquet")
        with pytest.raises(MissingError):
            read_elements(tmp_path / "none.parquet")


class TestVectors:
    def read(self, tmp_path: Path, path: Path) -> Elements:
        with ElementSink(tmp_path / "osm.parquet") as sink:
            read_vector_elements(path, sink)
        return read_elements(tmp_path / "osm.parquet")

    def test_tags_in_columns_and_ids(self, tmp_path: Path) -> None:
        square = shapely.box(500_000, 4_649_776, 500_100, 4_649_876)
        frame = gpd.GeoDataFrame(
            {"@id": ["way/5", "relation/6", "node/7"], "building": ["yes", None, None], "levels": [2, np.nan, 1]},
            geometry=[square, shapely.MultiPolygon([square]), square.centroid],
            crs="EPSG:32629",
        )
        frame.to_file(tmp_path / "a.gpkg")
        found = self.read(tmp_path, tmp_path / "a.gpkg")
        assert list(zip(found.osm_type.tolist(), found.osm_id.tolist(), strict=True)) == [(0, 7), (1, 5)]
        assert found.tags == [{"levels": "1"}, {"building": "yes", "levels": "2"}]
        assert shapely.get_x(found.geometry[0]) == pytest.approx(-9, abs=0.01)

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("label", "amenity:cafe;name:A b"),
            ("tags", '{"amenity": "cafe", "name": "A b"}'),
            ("other_tags", '"amenity"=>"cafe","name"=>"A b"'),
            ("label", "amenity=cafe;name=A b"),
            ("tags", "{'amenity': 'cafe', 'name': 'A b'}"),  # as GeoPandas writes mappings to a GeoPackage
            ("tags", "['amenity:cafe', 'name:A b']"),
            ("Labels", "amenity:cafe; name:A b"),
        ],
    )
    def test_tags_in_one_column(self, tmp_path: Path, column: str, value: str) -> None:
        frame = gpd.GeoDataFrame({column: [value]}, geometry=[shapely.Point(1, 2)], crs=4326)
        frame.to_file(tmp_path / "a.geojson")
        found = self.read(tmp_path, tmp_path / "a.geojson")
        assert found.tags == [{"amenity": "cafe", "name": "A b"}]
        assert found.osm_id[0] < 0
        again = self.read(tmp_path, tmp_path / "a.geojson")
        assert again.osm_id[0] == found.osm_id[0]

    def test_a_label_that_is_no_tags_hides_none(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        spots = [shapely.Point(1, 2), shapely.Point(1, 3), shapely.Point(1, 4)]
        rows = {"label": ["Bank", "note: old", None], "tags": [None] * 3, "amenity": ["bank", "cafe", "pub"]}
        gpd.GeoDataFrame(rows, geometry=spots, crs=4326).to_file(tmp_path / "a.gpkg")
        with caplog.at_level(logging.INFO, "rsosm"):
            found = self.read(tmp_path, tmp_path / "a.gpkg")
        assert sorted(t["amenity"] for t in found.tags) == ["bank", "cafe", "pub"]
        assert all(list(t) == ["amenity"] for t in found.tags)
        assert "The column label of a.gpkg holds no tags: it is left out." in caplog.text
        gpd.GeoDataFrame({"label": ["Bank"]}, geometry=spots[:1], crs=4326).to_file(tmp_path / "b.gpkg")
        with pytest.raises(FormatError, match=r"column label of b\.gpkg holds no tags.*key:value;key:value"):
            self.read(tmp_path, tmp_path / "b.gpkg")

    def test_values_with_equals_signs_stay_whole(self, tmp_path: Path) -> None:
        rows = {"label": ["website:https://a.org/?b=c", "addr:street=A;name=B=C", "name:A=B;shop:yes"]}
        spots = [shapely.Point(1, y) for y in range(3)]
        gpd.GeoDataFrame(rows, geometry=spots, crs=4326).to_file(tmp_path / "a.gpkg")
        tags = self.read(tmp_path, tmp_path / "a.gpkg").tags
        for one in (
            {"website": "https://a.org/?b=c"}, {"addr:street": "A", "name": "B=C"}, {"name": "A=B", "shop": "yes"},
        ):  # fmt: skip
            assert one in tags

    def test_our_own_table_goes_round(self, tmp_path: Path, shared: Path) -> None:
        with ElementSink(tmp_path / "osm.parquet") as sink:
            read_extract(shared / "data/osm/monaco.osm.pbf", sink)
        (tmp_path / "osm.parquet").rename(tmp_path / "first.parquet")
        first = read_elements(tmp_path / "first.parquet")
        second = self.read(tmp_path, tmp_path / "first.parquet")
        assert second.osm_id.tolist() == first.osm_id.tolist()
        assert second.osm_type.tolist() == first.osm_type.tolist()
        assert second.tags == first.tags
        assert shapely.equals(first.geometry, second.geometry).all()

    def test_geolink_chips(self, tmp_path: Path, shared: Path) -> None:
        path = shared / "data/geolink_chips/a472140250_FI_21/a472140250_FI_21_line.geojson"
        found = self.read(tmp_path, path)
        assert len(found) > 0
        assert all(found.tags)
        assert len(set(found.osm_id)) == len(found)

    def test_several_parts_become_several_elements(self, tmp_path: Path) -> None:
        lines = shapely.MultiLineString([[(0, 0), (1, 1)], [(2, 2), (3, 3)]])
        frame = gpd.GeoDataFrame({"osm_id": [9], "highway": ["path"]}, geometry=[lines], crs=4326)
        frame.to_file(tmp_path / "a.gpkg")
        found = self.read(tmp_path, tmp_path / "a.gpkg")
        assert sorted(found.osm_id)[1] == 9
        assert sorted(found.osm_id)[0] < 0

    def test_what_gdal_makes_of_an_osm_file(self, tmp_path: Path, shared: Path) -> None:
        source, copy = shared / "data/osm/monaco.osm.pbf", tmp_path / "monaco.gpkg"
        for layer in ("points", "lines", "multipolygons"):
            pyogrio.write_dataframe(pyogrio.read_dataframe(source, layer=layer), copy, layer=layer)
        found = self.by_id(self.read(tmp_path, copy))
        with ElementSink(tmp_path / "extract.parquet") as sink:
            read_extract(source, sink)
        known = self.by_id(read_elements(tmp_path / "extract.parquet"))
        both = found.keys() & known.keys()
        assert len(both) > 0.995 * max(len(found), len(known))  # they differ on broken ones
        relations = {key for key in known if key[0] == "relation"}
        assert len(relations) > 40
        assert relations <= both
        # GDAL leaves some keys out (`source`, `fixme`, `area`), and invents none.
        assert all(found[key].items() <= known[key].items() for key in both)

    @staticmethod
    def by_id(table: Elements) -> dict[tuple[str, int], dict[str, str]]:
        return {
            (OSM_TYPES[t], int(i)): tags for t, i, tags in zip(table.osm_type, table.osm_id, table.tags, strict=True)
        }

    def test_a_relation_and_a_way_of_one_number(self, tmp_path: Path) -> None:
        squares = [shapely.MultiPolygon([shapely.box(x, 0, x + 0.1, 0.1)]) for x in (0, 1)]
        areas = {
            "osm_id": ["77", None],
            "osm_way_id": [None, "88"],
            "building": ["yes", "yes"],
            "type": ["multipolygon", ""],
        }
        gpd.GeoDataFrame(areas, geometry=squares, crs=4326).to_file(tmp_path / "a.gpkg", layer="multipolygons")
        lines = {"osm_id": ["77"], "highway": ["path"], "other_tags": ['"a \\"b\\""=>"c:\\\\d","e"=>""']}
        path = [shapely.LineString([(0, 0), (1, 1)])]
        gpd.GeoDataFrame(lines, geometry=path, crs=4326).to_file(tmp_path / "a.gpkg", layer="lines")
        route = {"osm_id": ["5"], "type": ["route"], "other_tags": ['"route"=>"bus"']}
        gpd.GeoDataFrame(route, geometry=path, crs=4326).to_file(tmp_path / "a.gpkg", layer="multilinestrings")
        assert self.by_id(self.read(tmp_path, tmp_path / "a.gpkg")) == {
            ("way", 77): {"highway": "path", 'a "b"': "c:\\d", "e": ""},
            ("way", 88): {"building": "yes"},
            ("relation", 5): {"route": "bus"},
            ("relation", 77): {"building": "yes"},
        }

    def test_osm2pgsql_negates_relations(self, tmp_path: Path) -> None:
        shapes = [shapely.box(0, 0, 0.1, 0.1), shapely.box(1, 0, 1.1, 0.1), shapely.Point(0, 0)]
        rows = {"osm_id": [-77, 77, -5], "building": ["yes"] * 3}
        gpd.GeoDataFrame(rows, geometry=shapes, crs=4326).to_file(tmp_path / "a.gpkg", layer="planet_osm_polygon")
        assert set(self.by_id(self.read(tmp_path, tmp_path / "a.gpkg"))) == {
            ("relation", 77),
            ("way", 77),
            ("node", -5),
        }

    def test_files_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "a.gpkg").write_bytes(b"nonsense")
        with pytest.raises(FormatError, match=r"a\.gpkg is damaged"):
            self.read(tmp_path, tmp_path / "a.gpkg")
        frame = gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(0, 0)], crs=4326)
        frame.to_file(tmp_path / "b.shp")
        (tmp_path / "b.prj").unlink()
        with pytest.raises(UsageError, match=r"b\.shp does not say its CRS"):
            self.read(tmp_path, tmp_path / "b.shp")


class TestLayers:
    def test_every_layer_with_geometry_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "layers.gpkg"
        line = shapely.LineString([(445_000, 5_540_000), (446_000, 5_540_000)])
        for layer, tags, shape, crs in (
            ("points", {"shop": "yes"}, shapely.Point(8, 50), "EPSG:4326"),
            ("lines", {"highway": "path"}, line, "EPSG:32632"),
            ("multipolygons", {"building": "yes"}, shapely.box(8, 50, 8.01, 50.01), "EPSG:4326"),
        ):
            frame = gpd.GeoDataFrame({k: [v] for k, v in tags.items()}, geometry=[shape], crs=crs)
            frame.to_file(path, layer=layer)
        with ElementSink(tmp_path / "osm.parquet") as sink:
            read_vector_elements(path, sink)
        assert (sink.counts.point, sink.counts.line, sink.counts.polygon) == (1, 1, 1)
        box = place_of_extract("x", [path]).geometry.bounds
        assert box[2] > 8.2  # of the lines, in another CRS
        assert box[3] == pytest.approx(50.01)

    def test_row_numbers_are_no_osm_ids(self, tmp_path: Path) -> None:
        boxes = [shapely.box(8 + i / 100, 50, 8.005 + i / 100, 50.01) for i in range(5)]
        for name, tags in (("a", {"building": "yes"}), ("b", {"landuse": "grass"})):
            frame = gpd.GeoDataFrame(
                {"id": range(1, 6), **{k: [v] * 5 for k, v in tags.items()}}, geometry=boxes, crs=4326
            )
            frame.to_file(tmp_path / f"{name}.gpkg")
        with ElementSink(tmp_path / "osm.parquet") as sink:
            for name in "ab":
                read_vector_elements(tmp_path / f"{name}.gpkg", sink)
        assert (sink.counts.polygon, sink.counts.duplicates) == (10, 0)

    def test_many_features_come_in_portions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_elements(tmp_path / "a.parquet", elements(1000))
        for name, rows in (("once", 20_000), ("portions", 64)):
            monkeypatch.setattr(vectors_module, "_ROWS", rows)
            with ElementSink(tmp_path / f"{name}.parquet", shapely.box(-8.6, 41.2, -8.4, 41.6)) as sink:
                read_vector_elements(tmp_path / "a.parquet", sink)
            assert 0 < sink.counts.point < 1000
        assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "portions.parquet").read_bytes()
