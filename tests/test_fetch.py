"""``fetch``: skipping, resuming, keeping, racing; names that would break a file system."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from map_services import EAST, NORTH, SOUTH, WEST, Reply, Services, osm_xml, serving
from osm_documents import document, node, ring, way

from rsosm_cli.errors import FormatError, MissingError, RsosmError, SourceError, UsageError
from rsosm_cli.osm.elements import read_elements
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.fetch_imagery import HOW_TO_ADD_IMAGERY
from rsosm_cli.places.place import read_place
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import Workspace, provenance

BBOX = (10.0, 50.0, 10.009, 50.009)


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RSOSM_IMAGERY", raising=False)
    monkeypatch.setenv("RSOSM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def town(tmp_path: Path) -> Path:
    path = tmp_path / "town.osm"
    path.write_text(document(way(1, ring(0, 0, 2), building="yes"), node(1, 10.005, 50.005, amenity="cafe")))
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.tif"
    transform = rasterio.transform.from_bounds(*BBOX, 64, 64)
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8", crs="EPSG:4326", transform=transform
    ) as target:
        target.write(np.random.default_rng(0).integers(1, 255, (3, 64, 64), dtype=np.uint8))
    return path


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


def test_two_fetches_give_equal_bytes_and_force_does_it_again(tmp_path: Path, town: Path) -> None:
    for root in ("a", "b"):
        fetch("Town", root=tmp_path / root, osm=[town], bbox=BBOX)
    names = ("place.geojson", "osm.parquet")
    first, second = ([(tmp_path / r / "cities/town" / n).read_bytes() for n in names] for r in "ab")
    assert first == second
    assert fetch("Town", root=tmp_path / "a", osm=[town], bbox=BBOX, force=True).status == "done"


def test_what_changed_is_fetched_again(tmp_path: Path, town: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    town.write_text(document(node(1, 10.005, 50.005, amenity="bank"), node(2, 10.006, 50.006, shop="yes")))
    result = fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    assert (result.status, result.numbers["points"], result.numbers["polygons"]) == ("done", 2, 0)
    (tmp_path / "cities/town/osm.parquet").unlink()
    assert fetch("Town", root=tmp_path, osm=[town], bbox=BBOX).status == "done"


def test_imagery_is_added_later_without_naming_the_rest(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    stamp = (tmp_path / "cities/town/osm.parquet").stat().st_mtime_ns
    town.unlink()
    result = fetch("Town", root=tmp_path, imagery=[str(photo)], offline=True)
    assert result.status == "done"
    assert Path(result.paths["imagery"]).is_file()
    assert "kept" in " ".join(result.notes)
    assert (tmp_path / "cities/town/osm.parquet").stat().st_mtime_ns == stamp
    assert fetch("Town", root=tmp_path, imagery=[str(photo)]).status == "skipped"
    assert len(provenance(Workspace(tmp_path).city("Town").manifest.read())) == 2


def test_force_starts_over_from_the_sources_of_last_time(
    tmp_path: Path, town: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetch("Town", root=tmp_path, osm=["town.osm"], bbox=BBOX, imagery=[photo.name])
    files = Workspace(tmp_path).city("Town")
    before = {
        name: (files.folder / name).stat().st_mtime_ns for name in ("osm.parquet", "place.geojson", "imagery.tif")
    }
    monkeypatch.chdir("/")  # the record has no relative paths
    town.write_text(document(node(1, 10.005, 50.005, amenity="bank")))
    result = fetch("Town", root=tmp_path, force=True, offline=True)
    assert (result.status, result.numbers["points"], result.numbers["polygons"]) == ("done", 1, 0)
    assert read_place(files.place).geometry.bounds == BBOX
    assert all((files.folder / name).stat().st_mtime_ns > stamp for name, stamp in before.items())
    assert fetch("Town", root=tmp_path).status == "skipped"
    town.unlink()
    with pytest.raises(MissingError, match=r"town was made of .*town\.osm, which is not there any more"):
        fetch("Town", root=tmp_path, force=True)
    assert files.osm.is_file()


def test_imagery_from_the_environment_and_the_root(
    tmp_path: Path, town: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(f"imagery: {photo}\ncontact: me@example.org\n")
    assert "imagery" in fetch("Town", root=tmp_path, osm=[town], bbox=BBOX).paths
    monkeypatch.setenv("RSOSM_IMAGERY", str(tmp_path / "none.tif"))
    with pytest.raises(MissingError, match=r"none\.tif"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)
    (tmp_path / "config.yaml").write_text("imagry: x.tif\n")
    with pytest.raises(UsageError, match=r"imagry.*imagery"):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX)


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


def test_imagery_follows_a_place_that_changes(tmp_path: Path, town: Path, photo: Path) -> None:
    west, south, _, north = BBOX
    small, shifted = (west, south, 10.005, north), (west, south, 10.018, north)
    settings = FetchSettings(bands=(2, 2, 1))
    fetch("Town", root=tmp_path, osm=[town], bbox=small, imagery=[str(photo)], settings=settings)
    fetch("Town", root=tmp_path, imagery=[str(photo)], epoch="2019")
    # Of the user's files it is made again as it was; images of other dates are told.
    plan = fetch("Town", root=tmp_path, osm=[town], bbox=shifted, dry_run=True)
    assert "The imagery covers 50 % of the place." in plan.notes
    result = fetch("Town", root=tmp_path, osm=[town], bbox=shifted)
    assert "The imagery covers 50 % of the place." in result.notes
    assert "imagery-2019.tif was made for the place as it was before and reaches over 50 %" in " ".join(result.notes)
    assert Workspace(tmp_path).city("Town").manifest.step("fetch:imagery")["chosen"] == [2, 2, 1]
    again = fetch("Town", root=tmp_path, osm=[town], bbox=shifted)
    assert "The imagery that is there is kept." in again.notes
    # Where they are gone, what is there stays and its share is said, every time.
    photo.unlink()
    for _ in range(2):
        gone = " ".join(fetch("Town", root=tmp_path, osm=[town], bbox=BBOX).notes)
        assert "imagery.tif was made for the place as it was before and reaches over 100 %" in gone
        assert "fetch it anew with --imagery /" in gone
    assert fetch("Town", root=tmp_path, osm=[town], bbox=BBOX).status == "skipped"


def test_what_is_skipped_shows_its_numbers_in_the_same_order(tmp_path: Path, town: Path, photo: Path) -> None:
    first = fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)])
    second = fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)])
    assert (first.status, second.status) == ("done", "skipped")
    assert list(first.numbers.items()) == list(second.numbers.items())


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
    with pytest.raises(MissingError, match=r"no tagged OSM object.*longitude before latitude"):
        fetch("Sea", root=tmp_path, osm=[town], bbox=(0, 0, 1, 1))
    assert not (tmp_path / "cities/sea/osm.parquet").exists()


def test_wrong_sources(tmp_path: Path, town: Path, photo: Path) -> None:
    with pytest.raises(MissingError, match="no OSM file"):
        fetch("Town", root=tmp_path, osm=[tmp_path / "none.osm.pbf"])
    with pytest.raises(UsageError, match="a file does not have"):
        fetch("Town", root=tmp_path, osm=[town], settings=FetchSettings(date="2019-06-01"))
    with pytest.raises(UsageError, match="overpass excludes"):
        fetch("Town", root=tmp_path, osm=["overpass", town])
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


def _fetch_in_process(root: Path, osm: Path, answers: multiprocessing.Queue[str]) -> None:
    answers.put(fetch("Liechtenstein", root=root, osm=[osm]).status)


def test_two_processes_at_once(tmp_path: Path, shared: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    osm = shared / "data/osm/liechtenstein.osm.pbf"
    both = [context.Process(target=_fetch_in_process, args=(tmp_path, osm, answers)) for _ in range(2)]
    for process in both:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in both) == ["done", "skipped"]
    for process in both:
        process.join()


def test_a_killed_fetch_is_done_again(tmp_path: Path, shared: Path) -> None:
    osm = shared / "data/osm/liechtenstein.osm.pbf"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_fetch_in_process, args=(tmp_path / "a", osm, context.Queue()))
    process.start()
    city = tmp_path / "a/cities/liechtenstein"
    deadline = time.monotonic() + 60
    while not list(city.glob(".osm-*")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    fetch("Liechtenstein", root=tmp_path / "a", osm=[osm])
    fetch("Liechtenstein", root=tmp_path / "b", osm=[osm])
    whole = tmp_path / "b/cities/liechtenstein"
    for name in ("place.geojson", "osm.parquet"):
        assert (city / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in city.iterdir()) == sorted(p.name for p in whole.iterdir())


class TestServices:
    @pytest.fixture
    def services(self) -> Iterator[Services]:
        with serving() as server:
            yield server

    def test_a_name_alone(self, services: Services, tmp_path: Path) -> None:
        result = fetch("Testdorf", root=tmp_path, settings=services.settings(contact="me@example.org"))
        assert (result.numbers["points"], result.numbers["lines"], result.numbers["polygons"]) == (1, 1, 1)
        assert any("Klein Testdorf" in note for note in result.notes)
        place = read_place(Path(result.paths["place"]))
        assert place.geometry.bounds == (WEST, SOUTH, EAST, NORTH)
        assert [path for path, _ in services.asked] == ["/nominatim/search", "/api/interpreter"]
        assert all("me@example.org" in agent for agent in services.agents)
        again = fetch("Testdorf", root=tmp_path, settings=services.settings(contact="me@example.org"))
        assert again.status == "skipped"
        assert len(services.asked) == 2
        manifest = json.loads((tmp_path / "cities/testdorf/manifest.json").read_text())
        assert manifest["steps"]["fetch:place"]["osm_id"] == "R42"
        assert manifest["steps"]["fetch:osm"]["inputs"] == ["Overpass"]

    @pytest.mark.parametrize(
        ("source", "values", "said"),
        [
            ("stac:foo", {}, "stac:foo does not name an address after stac:"),
            ("stac:https://host/v1", {}, "names no collection"),
            ("wmts:host/caps.xml#ortho", {}, "does not name an address after wmts:"),
            ("wmts:https://host/caps.xml?key={MY_KEY}#ortho", {}, "neither MY_KEY nor RSOSM_MY_KEY"),
            ("https://host/{z}/{x}/{y}.png?key={MY_KEY}", {}, "neither MY_KEY nor RSOSM_MY_KEY"),
            ("https://host/{x}/{y}.png", {}, "has no {z}"),
            ("https://host/{z}/{x}/{y}.png", {"bands": (3, 2, 1)}, "--bands chooses among the bands of rasters"),
            ("https://host/{z}/{x}/{y}.png", {"nodata": 300}, "--nodata 300 is no value"),
            ("OpenStreetMap.Mapnik", {"xyz_zoom": 24}, "has zooms 0 to 19"),
            ("Esri.WorldImagry", {}, "is called Esri.WorldImagery"),
            ("MapTiler.Satellite", {}, "needs {key}"),
            ("ftp://host/a.tif", {}, "ftp is not one of"),
            ("https://host/a.tif?token=0", {}, "holds a key"),
            ("none.tif", {}, "There is no raster none.tif"),
            ("", {}, "is empty"),
            ("photo", {"bands": ("red",)}, "holds names"),
            ("photo", {"bands": (1, 2, 7)}, "7"),
            ("photo", {"nodata": 300}, "--nodata 300 is no value"),
            ("town", {}, "town.osm"),
        ],
    )
    def test_what_is_wrong_with_imagery_is_said_before_anybody_is_asked(
        self, services: Services, tmp_path: Path, town: Path, photo: Path, source: str, values: dict, said: str
    ) -> None:
        source = {"photo": str(photo), "town": str(town)}.get(source, source)
        with pytest.raises(RsosmError, match=re.escape(said)) as error:
            fetch("Testdorf", root=tmp_path, imagery=[source], settings=services.settings(**values))
        assert error.value.exit_status == 2 or source == str(town)
        assert not services.asked
        assert not (tmp_path / "cities" / "testdorf").exists()

    def test_other_wrong_options_are_refused_before_anybody_is_asked(self, services: Services, tmp_path: Path) -> None:
        for values, said in (
            ({"gsd": -1.0}, "--gsd -1"),
            ({"osm_id": "N5"}, "--osm-id 'N5'"),
            ({"bbox": (0, 0, 0, 1)}, "bbox"),
            ({"epoch": "a/b", "imagery": ["x.tif"]}, "--epoch 'a/b'"),
            ({"boundary": "none.geojson"}, "no boundary file"),
            ({"bbox": BBOX, "osm_id": "R5"}, "--bbox and --osm-id"),
        ):
            with pytest.raises(RsosmError, match=re.escape(said)) as error:
                fetch("Testdorf", root=tmp_path, settings=services.settings(), **values)
            assert error.value.exit_status == 2
        assert not services.asked

    def test_overpass_that_gives_up(self, services: Services, tmp_path: Path) -> None:
        services.overpass = lambda query: Reply(status=429, headers={"Retry-After": "600"})
        with pytest.raises(SourceError, match="Overpass at 127"):
            fetch("Testdorf", root=tmp_path, settings=services.settings(max_wait_s=1))
        assert not (tmp_path / "cities/testdorf/osm.parquet").exists()
        services.overpass = lambda query: Reply(osm_xml())
        assert fetch("Testdorf", root=tmp_path, settings=services.settings(max_wait_s=1)).status == "done"
        assert [path for path, _ in services.asked].count("/nominatim/search") == 1  # resumed after the place

    def test_after_kill_9_overpass_is_asked_only_for_the_rest(self, services: Services, tmp_path: Path) -> None:
        box = (10.0, 50.0, 10.1, 50.1)  # six requests
        script = (
            "import sys; from rsosm_cli.pipeline.fetch import fetch; from rsosm_cli.settings import FetchSettings; "
            "fetch('Town', root=sys.argv[1], bbox=(10.0, 50.0, 10.1, 50.1), "
            "settings=FetchSettings(overpass_url=sys.argv[2]))"
        )
        hang: list[str] = []

        def answer(query: str) -> Reply:
            if len(services.asked) == 3 and not hang:
                hang.append(query)
                return Reply(osm_xml(), hang_at=100)
            return Reply(osm_xml())

        services.overpass = answer
        command = [sys.executable, "-c", script, str(tmp_path / "a"), services.settings().overpass_url]
        process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
        deadline = time.monotonic() + 60
        while not hang and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        services.release.set()
        before = [data["data"] for _, data in services.asked]
        fetch("Town", root=tmp_path / "a", bbox=box, settings=services.settings())
        after = [data["data"] for _, data in services.asked[len(before) :]]
        assert after[0] == before[-1]  # what broke off, and then the rest
        assert not set(before[:-1]) & set(after)
        fetch("Town", root=tmp_path / "b", bbox=box, settings=services.settings())
        for name in ("osm.parquet", "place.geojson"):
            assert (tmp_path / "a/cities/town" / name).read_bytes() == (tmp_path / "b/cities/town" / name).read_bytes()
        assert len(services.asked) == len(before) + len(after)

    def test_after_kill_9_nominatim_is_asked_again_and_then_no_more(self, services: Services, tmp_path: Path) -> None:
        script = (
            "import sys; from rsosm_cli.pipeline.fetch import fetch; from rsosm_cli.settings import FetchSettings; "
            "fetch('Testdorf', root=sys.argv[1], settings=FetchSettings(overpass_url=sys.argv[2], "
            "nominatim_url=sys.argv[3]))"
        )
        services.trouble = [Reply(json.dumps(services.places).encode(), hang_at=50)]
        settings = services.settings()
        command = [sys.executable, "-c", script, str(tmp_path / "a"), settings.overpass_url, settings.nominatim_url]
        process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
        deadline = time.monotonic() + 60
        while not services.asked and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        services.release.set()
        assert not list((tmp_path / "a").rglob("place.geojson"))
        fetch("Testdorf", root=tmp_path / "a", settings=settings)
        fetch("Testdorf", root=tmp_path / "b", settings=settings)
        asked = [path for path, _ in services.asked]
        assert asked == ["/nominatim/search", "/nominatim/search", "/api/interpreter"]  # the answers are kept
        for name in ("osm.parquet", "place.geojson"):
            one, other = (tmp_path / root / "cities/testdorf" / name for root in "ab")
            assert one.read_bytes() == other.read_bytes()

    def test_a_place_too_large_for_overpass(self, services: Services, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"asked of Overpass.*geofabrik.*--osm FILE\.osm\.pbf"):
            fetch("Testdorf", root=tmp_path, osm=["overpass"], settings=services.settings(overpass_max_km2=1))
        assert [path for path, _ in services.asked] == ["/nominatim/search"]

    def test_the_past_replaces_the_elements_and_keeps_the_place(self, services: Services, tmp_path: Path) -> None:
        fetch("Testdorf", root=tmp_path, settings=services.settings())
        services.overpass = lambda query: Reply(osm_xml().replace(b"cafe", b"bank") if "[date:" in query else osm_xml())
        past = services.settings(date="2019-06-01")
        assert fetch("Testdorf", root=tmp_path, settings=past).status == "done"
        assert {"amenity": "bank"} in read_elements(tmp_path / "cities/testdorf/osm.parquet").tags
        step = Workspace(tmp_path).city("Testdorf").manifest.step("fetch:osm")
        assert step["date"] == "2019-06-01"
        assert fetch("Testdorf", root=tmp_path, settings=past).status == "skipped"
        fetch("Testdorf", root=tmp_path, settings=services.settings(), force=True)  # starts over from the same day
        assert {"amenity": "bank"} in read_elements(tmp_path / "cities/testdorf/osm.parquet").tags
        with pytest.raises(UsageError, match="would replace its OSM elements"):
            fetch("Testdorf", root=tmp_path, settings=past, epoch="2019", imagery=["x.tif"])
        assert [path for path, _ in services.asked].count("/nominatim/search") == 1

    def test_offline_never_asks(self, services: Services, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="--offline"):
            fetch("Testdorf", root=tmp_path, settings=services.settings(), offline=True)
        with pytest.raises(SourceError, match="--offline"):
            fetch("Testdorf", root=tmp_path, settings=services.settings(), offline=True, bbox=BBOX)
        assert services.asked == []
