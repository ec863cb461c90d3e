"""``fetch`` from Nominatim and Overpass: asked once, in the right order, and never for what is known."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import call
from fetch_inputs import BBOX, write_photo
from map_services import EAST, NORTH, SOUTH, WEST, Reply, Services, osm_xml, serving

from rsosm_cli.errors import NoFileError, RsosmError, SourceError, UsageError
from rsosm_cli.osm.elements import read_elements
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.places.place import read_place
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import Workspace

pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture
def services() -> Iterator[Services]:
    with serving() as server:
        yield server


def test_a_name_alone(services: Services, tmp_path: Path) -> None:
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
    services: Services, tmp_path: Path, town: Path, photo: Path, source: str, values: dict, said: str
) -> None:
    source = {"photo": str(photo), "town": str(town)}.get(source, source)
    with pytest.raises(RsosmError, match=re.escape(said)) as error:
        fetch("Testdorf", root=tmp_path, imagery=[source], settings=services.settings(**values))
    assert error.value.exit_status == 2 or source == str(town)
    assert not services.asked
    assert not (tmp_path / "cities" / "testdorf").exists()


def test_dates_are_refused_where_they_are_said_beside_other_imagery(
    services: Services, tmp_path: Path, town: Path, photo: Path
) -> None:
    days = ["--dates", "2023-01-01/2023-12-31"]
    config = tmp_path / "many.yaml"
    config.write_text("stac_dates: 2023-01-01/2023-12-31\n")
    known = ["--root", str(tmp_path / "root"), "fetch", "--city", "Town"]
    named = [*known, "--osm", str(town), "--boundary", "extract", "--imagery", str(photo)]
    status, _, err = call(*named, *days)
    assert status == 2
    assert "chooses among the images of a STAC collection, and none is named" in err
    assert not (tmp_path / "root").exists()
    for again in ([*named, "--config", str(config)], [*known, *days], [*known, "--config", str(config)]):
        status, _, err = call(*again)
        assert status == 0, err
    assert not services.asked


def test_other_wrong_options_are_refused_before_anybody_is_asked(services: Services, tmp_path: Path) -> None:
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


def test_overpass_that_gives_up(services: Services, tmp_path: Path) -> None:
    services.overpass = lambda query: Reply(status=429, headers={"Retry-After": "600"})
    with pytest.raises(SourceError, match="Overpass at 127"):
        fetch("Testdorf", root=tmp_path, settings=services.settings(max_wait_s=1))
    assert not (tmp_path / "cities/testdorf/osm.parquet").exists()
    services.overpass = lambda query: Reply(osm_xml())
    assert fetch("Testdorf", root=tmp_path, settings=services.settings(max_wait_s=1)).status == "done"
    assert [path for path, _ in services.asked].count("/nominatim/search") == 1  # resumed after the place


def test_after_kill_9_overpass_is_asked_only_for_the_rest(services: Services, tmp_path: Path) -> None:
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


def _fetch_in_process(root: Path, overpass: str, nominatim: str, answers: multiprocessing.Queue[str]) -> None:
    settings = FetchSettings(overpass_url=overpass, nominatim_url=nominatim)
    answers.put(fetch("Testdorf", root=root, settings=settings).status)


def urls(services: Services) -> tuple[str, str]:
    settings = services.settings()
    return settings.overpass_url, settings.nominatim_url


def slow(query: str) -> Reply:
    time.sleep(0.5)
    return Reply(osm_xml())


def test_two_processes_at_once_ask_for_everything_once(services: Services, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    services.overpass = slow
    both = [context.Process(target=_fetch_in_process, args=(tmp_path, *urls(services), answers)) for _ in range(2)]
    for process in both:
        process.start()
    assert sorted(answers.get(timeout=60) for _ in both) == ["done", "skipped"]
    for process in both:
        process.join()
    assert [path for path, _ in services.asked] == ["/nominatim/search", "/api/interpreter"]
    assert len(services.counted) == 1
    assert services.most_at_once == 1


def test_two_cities_on_the_same_ground_in_two_processes_share_the_answers(services: Services, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    services.overpass = slow
    both = [context.Process(target=_fetch_in_process, args=(tmp_path / n, *urls(services), answers)) for n in "ab"]
    for process in both:
        process.start()
    assert [answers.get(timeout=60) for _ in both] == ["done", "done"]
    for process in both:
        process.join()
    assert [path for path, _ in services.asked] == ["/nominatim/search", "/api/interpreter"]
    one, other = (tmp_path / root / "cities/testdorf/osm.parquet" for root in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_after_kill_9_nominatim_is_asked_again_and_then_no_more(services: Services, tmp_path: Path) -> None:
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


def test_a_place_of_which_overpass_has_nothing(services: Services, tmp_path: Path) -> None:
    services.overpass = lambda query: Reply(b'<?xml version="1.0"?><osm version="0.6"></osm>')
    sea = (0.0, 0.0, 0.01, 0.01)
    with pytest.raises(RsosmError, match=r"of Overpass in Sea.* the place is the one meant, and that --bbox"):
        fetch("Sea", root=tmp_path, bbox=sea, settings=services.settings())
    with pytest.raises(RsosmError, match=r"the one meant, and that OSM had something there on 2013-01-01"):
        fetch("Testdorf", root=tmp_path, settings=services.settings(date="2013-01-01"))


def test_a_place_too_large_for_overpass(services: Services, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"asked of Overpass.*geofabrik.*--osm FILE\.osm\.pbf"):
        fetch("Testdorf", root=tmp_path, osm=["overpass"], settings=services.settings(overpass_max_km2=1))
    assert [path for path, _ in services.asked] == ["/nominatim/search"]


def test_the_past_replaces_the_elements_and_keeps_the_place(services: Services, tmp_path: Path) -> None:
    fetch("Testdorf", root=tmp_path, settings=services.settings())
    services.overpass = lambda query: Reply(osm_xml().replace(b"cafe", b"bank") if "[date:" in query else osm_xml())
    past = services.settings(date="2019-06-01")
    assert fetch("Testdorf", root=tmp_path, settings=past).status == "done"
    assert {"amenity": "bank"} in read_elements(tmp_path / "cities/testdorf/osm.parquet").tags
    step = Workspace(tmp_path).city("Testdorf").manifest.step("fetch:osm")
    assert step["date"] == "2019-06-01"
    assert fetch("Testdorf", root=tmp_path, settings=past).status == "skipped"
    assert [path for path, _ in services.asked].count("/nominatim/search") == 1
    fetch("Testdorf", root=tmp_path, settings=services.settings(), force=True)  # starts over from the same day
    assert {"amenity": "bank"} in read_elements(tmp_path / "cities/testdorf/osm.parquet").tags
    with pytest.raises(UsageError, match="would replace its OSM elements"):
        fetch("Testdorf", root=tmp_path, settings=past, epoch="2019", imagery=["x.tif"])


@pytest.mark.parametrize("dry_run", [False, True])
def test_starting_over_without_a_raster_is_refused_before_anybody_is_asked(
    services: Services, tmp_path: Path, photo: Path, dry_run: bool
) -> None:
    write_photo(photo, box=(WEST, SOUTH, EAST, NORTH))
    fetch("Testdorf", root=tmp_path, imagery=[str(photo)], settings=services.settings())
    photo.unlink()
    services.asked.clear()
    with pytest.raises(NoFileError, match=r"not there any more: .*photo\.tif"):
        fetch("Testdorf", root=tmp_path, settings=services.settings(), force=True, dry_run=dry_run)
    assert not services.asked


def test_starting_over_asks_again(services: Services, tmp_path: Path) -> None:
    for force in (False, True):
        fetch("Testdorf", root=tmp_path, settings=services.settings(), force=force)
    assert [path for path, _ in services.asked] == ["/nominatim/search", "/api/interpreter"] * 2


def test_how_old_the_answers_are_is_recorded_and_said(services: Services, tmp_path: Path) -> None:
    state = b'<osm version="0.6"><meta osm_base="2024-05-06T07:08:09Z"/>'
    services.overpass = lambda query: Reply(re.sub(b"<osm [^>]*>", state, osm_xml()))
    asked = {"osm": ["overpass"], "boundary": "nominatim"}
    done = fetch("Testdorf", root=tmp_path, settings=services.settings(), **asked)
    assert "The answers of Overpass show OSM as of 2024-05-06T07:08:09Z; --max-age 0 asks again." in done.notes
    assert not [note for note in done.notes if "was asked for it" in note]
    manifest = Workspace(tmp_path).city("Testdorf").manifest
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert manifest.step("fetch:place")["answered"].startswith(today)
    assert manifest.step("fetch:osm")["overpass"]["asked"].startswith(today)
    assert manifest.step("fetch:osm")["overpass"]["osm_base"] == "2024-05-06T07:08:09Z"
    # An age replaces what a server was asked for, where it is named again.
    old = services.settings(max_age_days=0)
    assert fetch("Testdorf", root=tmp_path, settings=services.settings(), **asked).status == "skipped"
    services.overpass = lambda query: Reply(osm_xml())
    new = fetch("Testdorf", root=tmp_path, settings=old, **asked)
    assert new.status == "done"
    assert "show OSM as of" not in " ".join(new.notes)
    # Where nothing is named it does so, too, by the age of what is recorded.
    before = len(services.asked)
    assert fetch("Testdorf", root=tmp_path, settings=services.settings(max_age_days=1)).status == "skipped"
    assert len(services.asked) == before
    again = fetch("Testdorf", root=tmp_path, settings=old)
    assert again.status == "done"
    assert [path for path, _ in services.asked[before:]] == ["/api/interpreter"]  # the place stays
    assert "--max-age leaves them" not in " ".join(again.notes)
    past = services.settings(date="2019-06-01")
    assert fetch("Testdorf", root=tmp_path, settings=past, **asked).status == "done"
    older = services.settings(date="2019-06-01", max_age_days=0)
    assert fetch("Testdorf", root=tmp_path, settings=older, **asked).status == "skipped"


def test_offline_never_asks(services: Services, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--offline"):
        fetch("Testdorf", root=tmp_path, settings=services.settings(), offline=True)
    with pytest.raises(SourceError, match="--offline"):
        fetch("Testdorf", root=tmp_path, settings=services.settings(), offline=True, bbox=BBOX)
    assert services.asked == []
