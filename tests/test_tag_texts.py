"""All tags of an element in one text, and the rows of vector files that are left out."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import pytest
import shapely
from element_tables import write_elements
from fetch_inputs import BBOX

from rsosm_cli import fetch
from rsosm_cli.errors import MissingError
from rsosm_cli.osm.elements import read_elements
from rsosm_cli.osm.sink import ElementSink
from rsosm_cli.osm.tag_texts import sign_of, unpacked
from rsosm_cli.osm.vectors import read_vector_elements

HOURS = {"building": "yes", "opening_hours": "Mo 08:00-12:00;Tu off"}


class TestTexts:
    @pytest.mark.parametrize(
        ("text", "tags"),
        [
            ("building=yes;opening_hours=Mo 08:00-12:00;Tu off", HOURS),
            ("building:yes;opening_hours:Mo 08:00-12:00; Tu off", HOURS),
            ("building=yes;description=see: here;x", {"building": "yes", "description": "see: here;x"}),
            ("building=yes;cuisine=pizza;kebab", {"building": "yes", "cuisine": "pizza;kebab"}),
            ("cuisine=pizza;kebab;;sushi;building=yes;", {"cuisine": "pizza;kebab;sushi", "building": "yes"}),
            ("cuisine:pizza;kebab", {"cuisine": "pizza;kebab"}),
            ("hours:Mo 08:00-12:00;Tu 10:00-12:00", {"hours": "Mo 08:00-12:00;Tu 10:00-12:00"}),
            ("website:https://a.org;https://b.org/?c=d", {"website": "https://a.org;https://b.org/?c=d"}),
            ("website=https://a.org;https://b.org/?c=d", {"website": "https://a.org;https://b.org/?c=d"}),
            ("building=yes;name=;ref=5", {"building": "yes", "ref": "5"}),
            ("building = yes; note = a => b", {"building": "yes", "note": "a => b"}),
            ("addr:city=Ulm;cuisine=pizza;kebab", {"addr:city": "Ulm", "cuisine": "pizza;kebab"}),
            ("kebab;building=yes", {"building": "yes"}),
            ("['cuisine=pizza;kebab', 'building=yes']", {"cuisine": "pizza;kebab", "building": "yes"}),
            ("", {}),
            (" ; ", {}),
            ("{}", {}),
            ("[]", {}),
            ('{"a": null}', {}),
            ("Bank", None),
            ("building=", None),
            ('{"building": "y', None),
            ("[1, 2]", None),
        ],
    )
    def test_semicolons_in_values(self, text: str, tags: dict[str, str] | None) -> None:
        assert unpacked(text) == tags

    def test_the_column_decides_where_a_text_reads_both_ways(self) -> None:
        text = "addr:housename=Foo;see: bar"
        sign = sign_of(["building=yes;cuisine=pizza;kebab", None, text, "shop=books"])
        assert unpacked(text, sign) == {"addr:housename": "Foo;see: bar"}
        assert unpacked("name:A=B;Tu off", sign_of(["shop:yes", "building:yes"])) == {"name": "A=B;Tu off"}
        assert sign_of(["a:b=c", "Mo 08:00", None]) is None


class TestRowsLeftOut:
    """Of eleven rows three have no geometry, two have tags that cannot be read, two have none."""

    def frame(self) -> gpd.GeoDataFrame:
        spots: list[shapely.Point | None] = [shapely.Point(10.001 + i / 1000, 50.004) for i in range(8)]
        tags = ["amenity=cafe;cuisine=pizza;cake", "shop=yes", None, "amenity", "", "{broken", "building=yes", "shop=d"]
        rows = {"tags": [*tags, "shop=a", "shop=b", "shop=c"]}
        return gpd.GeoDataFrame(rows, geometry=[*spots, None, None, None], crs=4326)

    @pytest.mark.parametrize("ending", ["gpkg", "geojson", "shp", "gml", "parquet"])
    def test_fetch_says_how_many(self, tmp_path: Path, ending: str) -> None:
        path, frame = tmp_path / f"shapes.{ending}", self.frame()
        frame.to_parquet(path) if ending == "parquet" else frame.to_file(path)
        result = fetch("Town", root=tmp_path / "out", bbox=BBOX, osm=[path])
        assert f"3 of 11 rows of shapes.{ending} have no geometry and are left out." in result.notes
        unread = [note for note in result.notes if "tags that cannot be read" in note]
        assert unread == [f"2 of 11 rows of shapes.{ending} have tags that cannot be read and are left out."]

    def test_those_elsewhere_do_not_count(self, tmp_path: Path) -> None:
        frame = self.frame()
        frame.to_file(tmp_path / "shapes.gpkg")
        with ElementSink(tmp_path / "osm.parquet", shapely.box(10.0, 50.0, 10.0045, 50.009)) as sink:
            notes = read_vector_elements(tmp_path / "shapes.gpkg", sink)
        assert (sink.counts.unplaced, sink.counts.unread, sink.counts.point) == (3, 1, 2)
        assert notes[1] == (
            "1 of 4 rows of shapes.gpkg near the place have tags that cannot be read and are left out."
        )  # fmt: skip
        found = read_elements(tmp_path / "osm.parquet").tags
        assert {"amenity": "cafe", "cuisine": "pizza;cake"} in found

    @pytest.mark.parametrize("ending", ["gpkg", "geojson"])
    def test_an_empty_geometry_is_none(self, tmp_path: Path, ending: str) -> None:
        frame = self.frame()
        frame.loc[0, "geometry"] = shapely.Point()
        frame.to_file(tmp_path / f"a.{ending}")
        with ElementSink(tmp_path / "osm.parquet", shapely.box(*BBOX)) as sink:
            notes = read_vector_elements(tmp_path / f"a.{ending}", sink)
        assert notes[0] == f"4 of 11 rows of a.{ending} have no geometry and are left out."

    def test_nothing_is_said_where_all_is_read(self, tmp_path: Path) -> None:
        frame = self.frame().iloc[:3]
        for ending in ("gpkg", "fgb"):
            frame.to_file(tmp_path / f"a.{ending}")
            with ElementSink(tmp_path / "osm.parquet") as sink:
                assert read_vector_elements(tmp_path / f"a.{ending}", sink) == []
        write_elements(tmp_path / "b.parquet", read_elements(tmp_path / "osm.parquet"))
        with ElementSink(tmp_path / "osm.parquet") as sink:
            assert read_vector_elements(tmp_path / "b.parquet", sink) == []

    def test_a_file_of_such_rows_alone(self, tmp_path: Path) -> None:
        self.frame().iloc[8:].to_file(tmp_path / "a.gpkg")
        with pytest.raises(MissingError) as caught:
            fetch("Town", root=tmp_path / "out", bbox=BBOX, osm=[tmp_path / "a.gpkg"])
        assert "3 of 3 rows of a.gpkg have no geometry" in str(caught.value.hint)
