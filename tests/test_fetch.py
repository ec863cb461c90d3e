"""``fetch``: sources of every form, epochs, plans; names that would break a file system."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import geopandas as gpd
import osmium
import pytest
import rasterio
import shapely
from fetch_inputs import BBOX
from osm_documents import document, node

from rsosm_cli.errors import FormatError, MissingError, SourceError, UsageError
from rsosm_cli.osm.elements import read_elements
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.fetch_imagery import HOW_TO_ADD_IMAGERY
from rsosm_cli.places.place import read_place
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import Workspace, provenance

pytestmark = pytest.mark.usefixtures("own_surroundings")


def test_a_city_of_an_extract_says_which_it_is_and_what_is_cut(tmp_path: Path, shared: Path) -> None:
    osm = [shared / "data/osm/liechtenstein.osm.pbf"]
    result = fetch("Vaduz", root=tmp_path, osm=osm)
    assert result.notes[0].startswith("Vaduz is Vaduz (R1155956, admin_level 8, LI, 17.3 km²)")
    assert Workspace(tmp_path).city("Vaduz").manifest.step("fetch:place")["country"] == "LI"
    cut = "28 objects of the whole of liechtenstein.osm.pbf are left out, in Vaduz or elsewhere"
    assert [note for note in result.notes if note.startswith(cut)]
    plan = fetch("Vaduz", root=tmp_path / "other", osm=osm, dry_run=True)
    assert plan.notes[0] == result.notes[0]


def test_liechtenstein_by_name(tmp_path: Path, shared: Path) -> None:
    osm = [shared / "data/osm/liechtenstein.osm.pbf"]
    result = fetch("Liechtenstein", root=tmp_path, osm=osm)
    assert result.status == "done"
    assert HOW_TO_ADD_IMAGERY in result.notes
    assert result.numbers["polygons"] > 9_500
    files = Workspace(tmp_path).city("Liechtenstein")
    place = read_place(files.place)
    elements = read_elements(files.osm)
    assert len(elements) == sum(result.numbers[k] for k in ("points", "lines", "polygons"))
    assert shapely.intersects(elements.geometry, place.geometry).all()
    manifest = files.manifest.read()
    assert [s["licence"] for s in provenance(manifest)] == ["ODbL-1.0"]
    assert manifest["steps"]["fetch:osm"]["counts"]["outside"] > 0
    assert (files.folder / "config.fetch.yaml").is_file()
    before = {p: p.stat().st_mtime_ns for p in files.folder.iterdir()}
    assert fetch("Liechtenstein", root=tmp_path, osm=osm).status == "skipped"
    assert {p: p.stat().st_mtime_ns for p in files.folder.iterdir()} == before


def test_porto_by_the_box_of_its_extract(tmp_path: Path, shared: Path) -> None:
    result = fetch("Porto", root=tmp_path, osm=[shared / "data/osm/porto.osm.pbf"], boundary="extract")
    assert result.numbers["area_km2"] == pytest.approx(8.05, abs=0.01)
    assert result.numbers["polygons"] > 15_000


def test_imagery_from_the_environment_and_the_root(
    tmp_path: Path, town: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(f"imagery: {photo}\ncontact: me@example.org\n")
    assert "imagery" in fetch("Town", root=tmp_path, osm=[town], bbox=BBOX).paths
    monkeypatch.setenv("RSOSM_IMAGERY", str(tmp_path / "none.tif"))
    with pytest.raises(MissingError, match=r"^RSOSM_IMAGERY: There is no raster .*none\.tif"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    monkeypatch.delenv("RSOSM_IMAGERY")
    (tmp_path / "config.yaml").write_text("imagery: nothere.tif\n")
    with pytest.raises(MissingError, match=r"^`imagery` of .*config\.yaml: There is no raster .*nothere\.tif"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    (tmp_path / "config.yaml").write_text("imagery: Esri.WorldImagry\n")
    with pytest.raises(MissingError, match=r"config\.yaml: There is no raster Esri.* is called Esri\.WorldImagery"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    (tmp_path / "config.yaml").write_text("imagry: x.tif\n")
    with pytest.raises(UsageError, match=r"imagry.*imagery"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)


def test_paths_of_the_root_s_defaults_count_from_its_folder(
    tmp_path: Path, town: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sheets").mkdir()
    (tmp_path / "sheets/photo.tif").write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    for number, source in enumerate((photo.name, "sheets", "sheets/*.tif", str(photo))):
        (tmp_path / "config.yaml").write_text(f'imagery: "{source}"\n')
        assert "imagery" in fetch(f"Town {number}", root=tmp_path, osm=[town], bbox=BBOX).paths


def test_images_of_epochs_stand_side_by_side(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)])
    files = Workspace(tmp_path).city("Town")
    plain = files.imagery.read_bytes()
    older = tmp_path / "older.tif"
    older.write_bytes(photo.read_bytes())
    result = fetch("Town", root=tmp_path, imagery=[str(older)], epoch="2019")
    assert result.paths["imagery"] == str(files.imagery_of("2019"))
    assert result.paths["imagery"].endswith("imagery-2019.tif")
    assert files.imagery.read_bytes() == plain
    assert (files.folder / "imagery-2019" / "info.json").is_file()
    step = files.manifest.step("fetch:imagery-2019")
    assert (step["epoch"], step["sources"][0]["name"]) == ("2019", "older.tif")
    assert files.epochs() == ["2019"]
    assert fetch("Town", root=tmp_path, imagery=[str(older)], epoch="2019").status == "skipped"
    assert fetch("Town", root=tmp_path, imagery=[str(photo)]).status == "skipped"
    with pytest.raises(UsageError, match="names no imagery"):
        fetch("Town", root=tmp_path, epoch="2019")
    with pytest.raises(UsageError, match=r"'\.\./x' cannot be part"):
        fetch("Town", root=tmp_path, imagery=[str(older)], epoch="../x")


@pytest.mark.parametrize(
    "source",
    [
        "wmts:http://127.0.0.1:9/caps.xml#ortho",
        "tms:http://127.0.0.1:9/tms",
        "stac:http://127.0.0.1:9/v1#c",
        "http://127.0.0.1:9/a.tif",
    ],
)
def test_offline_plans_ask_nobody(tmp_path: Path, town: Path, source: str) -> None:
    with pytest.raises(UsageError, match="on the network, and --offline forbids it"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[source], offline=True, dry_run=True)


def test_a_dry_run_writes_nothing_and_tells_sizes(tmp_path: Path, town: Path, photo: Path) -> None:
    root = tmp_path / "root"
    result = fetch("Town", root=root, osm=[town], bbox=BBOX, imagery=[str(photo)], dry_run=True)
    assert result.status == "planned"
    assert result.numbers["osm_read_mb"] == pytest.approx(town.stat().st_size / 1e6, abs=1e-3)
    assert result.numbers["area_km2"] > 0.5
    assert not root.exists()
    plan = fetch("Town", root=root, bbox=BBOX, dry_run=True, offline=True)
    assert plan.numbers["osm_download_mb"] > 0
    with pytest.raises(SourceError, match=r"km².*asked of Overpass"):
        fetch("Land", root=root, osm=["overpass"], bbox=(10, 50, 12, 52), dry_run=True)


def test_nearly_empty_ground_is_told(tmp_path: Path, town: Path) -> None:
    corner = [node(i, 10.001 + i * 1e-5, 50.001, amenity="bench") for i in range(1, 60)]
    town.write_text(document(*corner))
    result = fetch("Town", root=tmp_path, osm=[town], bbox=(10.0, 50.0, 10.1, 50.1))
    assert result.numbers["sparse_share"] > 0.9
    assert "less than a tenth of the average" in " ".join(result.notes)
    numbers = Workspace(tmp_path).city("Town").manifest.step("fetch:osm")["numbers"]
    assert numbers["objects_per_km2_median"] == 0


def test_a_place_without_objects(tmp_path: Path, town: Path) -> None:
    with pytest.raises(MissingError, match=r"no tagged OSM object.*has lie in .*longitude before latitude"):
        fetch("Sea", root=tmp_path, osm=[town], bbox=(0, 0, 1, 1))
    assert not (tmp_path / "cities/sea/osm.parquet").exists()


def test_every_form_of_an_osm_file_and_several_at_once(tmp_path: Path) -> None:
    def one(number: int) -> str:
        return document(node(number, 10.004, 50.004 + number * 1e-4, amenity="cafe"))

    files = [tmp_path / f"a.{ending}" for ending in ("osm", "osm.gz", "osm.bz2", "osm.pbf")]
    files[0].write_text(one(1))
    files[1].write_bytes(gzip.compress(one(2).encode()))
    files[2].write_bytes(bz2.compress(one(3).encode()))
    (tmp_path / "b.osm").write_text(one(4))
    with osmium.SimpleWriter(str(files[3])) as writer:
        for item in osmium.FileProcessor(str(tmp_path / "b.osm")):
            writer.add(item)
    spot = [shapely.Point(10.005, 50.005)]
    columns = gpd.GeoDataFrame({"amenity": ["bank"]}, geometry=spot, crs=4326)
    together = gpd.GeoDataFrame({"tags": ["amenity:bench;colour:red"]}, geometry=spot, crs=4326)
    for name, frame in (
        ("columns", columns),
        ("tags", together),
        ("label", together.rename(columns={"tags": "label"})),
    ):
        for ending in ("gpkg", "geojson", "shp"):
            frame.to_file(files[0].with_name(f"{name}.{ending}"))
        frame.to_parquet(tmp_path / f"{name}.parquet")
        files += [tmp_path / f"{name}.{ending}" for ending in ("gpkg", "geojson", "shp", "parquet")]
    for number, file in enumerate(files):
        assert fetch(f"Town {number}", root=tmp_path, osm=[file], bbox=BBOX).numbers["points"] == 1, file.name
    assert fetch("All", root=tmp_path, osm=files[:4], bbox=BBOX).numbers["points"] == 4
    found = [read_elements(tmp_path / f"cities/town-{n}/osm.parquet").tags for n in (3, 4, 8, 12)]
    bench = [{"amenity": "bench", "colour": "red"}]
    assert found == [[{"amenity": "cafe"}], [{"amenity": "bank"}], bench, bench]


def test_an_osm_file_is_read_by_what_it_holds(tmp_path: Path, town: Path) -> None:
    packed = tmp_path / "packed.osm.pbf"
    with osmium.SimpleWriter(str(packed)) as writer:
        for item in osmium.FileProcessor(str(town)):
            writer.add(item)
    for name, content in (
        ("pbf.osm", packed.read_bytes()),
        ("gz.osm.pbf", gzip.compress(town.read_bytes())),
        ("bz2.osm", bz2.compress(town.read_bytes())),
        ("plain.osm.gz", b"\xef\xbb\xbf" + town.read_bytes()),
    ):
        (tmp_path / name).write_bytes(content)
        result = fetch(name, root=tmp_path, osm=[tmp_path / name], boundary="extract")
        assert (result.numbers["points"], result.numbers["polygons"]) == (1, 1), name


def test_a_vector_file_that_lies_elsewhere_says_where(tmp_path: Path) -> None:
    house = gpd.GeoDataFrame({"building": ["yes"]}, geometry=[shapely.box(825000, 5420000, 826000, 5421000)], crs=3857)
    house.to_crs(4326).to_file(tmp_path / "house.geojson")
    said = r"in Town \(.*\); those that it has lie in 7\.41\d+ 43\.7.* Check that the file"
    with pytest.raises(MissingError, match=said):
        fetch("Town", root=tmp_path, osm=[tmp_path / "house.geojson"], bbox=BBOX, offline=True)
    document = json.loads(house.to_json())
    document.pop("crs")  # GeoJSON is in degrees, where it does not say so
    (tmp_path / "metres.geojson").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"metres\.geojson lies in 825000 5420000 .*, which are no degrees"):
        fetch("Town", root=tmp_path, osm=[tmp_path / "metres.geojson"], bbox=BBOX, offline=True)


def test_wrong_sources(tmp_path: Path, town: Path, photo: Path) -> None:
    with pytest.raises(MissingError, match="is a folder, and no OSM file"):
        fetch("Town", root=tmp_path, osm=[tmp_path], bbox=BBOX)
    with pytest.raises(MissingError, match="no OSM file"):
        fetch("Town", root=tmp_path, osm=[tmp_path / "none.osm.pbf"])
    with pytest.raises(UsageError, match="a file does not have"):
        fetch("Town", root=tmp_path, osm=[town], settings=FetchSettings(date="2019-06-01"))
    with pytest.raises(UsageError, match="overpass excludes"):
        fetch("Town", root=tmp_path, osm=["overpass", town])
    with pytest.raises(
        UsageError, match=r"http://\*\*\*@host/x\.osm\.pbf is an address\. Download it.*geofabrik"
    ) as told:
        fetch("Town", root=tmp_path, osm=["http://me:s3cret@host/x.osm.pbf"])
    assert "s3cret" not in str(told.value)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match=r"a\.txt is neither"):
        fetch("Town", root=tmp_path, osm=[tmp_path / "a.txt"])
    with pytest.raises(MissingError, match="no boundary file"):
        fetch("Town", root=tmp_path, osm=[town], boundary="none.geojson")
    (tmp_path / "b.osm.pbf").write_bytes(b"x" * 1000)
    with pytest.raises(FormatError, match=r"b\.osm\.pbf is damaged"):
        fetch("Town", root=tmp_path, osm=[tmp_path / "b.osm.pbf"], bbox=BBOX)
    assert not (tmp_path / "cities/town/osm.parquet").exists()
    for source in (str(photo), "https://127.0.0.1:9/{z}/{x}/{y}.png"):
        with pytest.raises(UsageError, match=r"--nodata 300 is no value of .* uint8: 0 to 255\."):
            fetch(
                "Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[source], settings=FetchSettings(nodata=300),
                dry_run=True,
            )  # fmt: skip
    with pytest.raises(MissingError, match="No administrative boundary"):
        fetch("Nowhere", root=tmp_path, osm=[town])
    assert not (tmp_path / "cities/nowhere").exists()


@pytest.mark.parametrize(
    "name",
    ["../../etc", "/etc/passwd", "CON", "nul", "x" * 300, "鎮" * 300, "🏙️", "a\nb", "..", "C:\\x", "~", "-rf", "%2e"],
)
def test_names_that_would_break_a_file_system(tmp_path: Path, town: Path, name: str) -> None:
    root = tmp_path / "inside" / "root"
    result = fetch(name, root=root, osm=[town], bbox=BBOX)
    folder = Path(result.paths["place"]).parent
    assert folder.parent.resolve() == (root / "cities").resolve()
    assert len(folder.name.encode()) <= 100
    assert [c.name for c in Workspace(root).cities()] == [name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "town.osm"]


def test_names_that_look_alike_stay_apart(tmp_path: Path, town: Path) -> None:
    names = ["Sao Paulo", "São Paulo", "Sao_Paulo", "Sao/Paulo", "San José", "San Jose"]
    folders = {fetch(n, root=tmp_path, osm=[town], bbox=BBOX).paths["place"] for n in names}
    assert len(folders) == len(names)
    with pytest.raises(UsageError, match="Sao-Paulo would have the folder of Sao Paulo") as refused:
        fetch("Sao-Paulo", root=tmp_path, osm=[town], bbox=BBOX)
    assert "--city 'Sao Paulo'" in str(refused.value.hint)
    assert fetch("sao  paulo", root=tmp_path, osm=[town], bbox=BBOX).paths["place"] in folders


def test_a_relative_root_can_be_read_from_elsewhere_and_moved(
    tmp_path: Path, town: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = FetchSettings(nodata=255)
    fetch("Town", root=Path("rel"), osm=[town], bbox=BBOX, imagery=[str(photo)], settings=settings, offline=True)
    monkeypatch.chdir(tmp_path.parent)
    moved = (tmp_path / "rel").rename(tmp_path / "moved")
    with rasterio.open(Workspace(moved).city("Town").imagery) as image:
        assert image.read().any()
