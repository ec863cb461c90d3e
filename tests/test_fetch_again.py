"""``fetch`` of a city that is there, or was broken off: skipping, starting over, keeping, going on, racing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import cast

import geopandas as gpd
import pytest
import shapely
from fetch_inputs import BBOX, write_photo
from osm_documents import document, node

from rsosm_cli.errors import FormatError, MissingError, SourceError, UsageError
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.info import info
from rsosm_cli.pipeline.result import Result
from rsosm_cli.places.place import read_place
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import Workspace, provenance

pytestmark = pytest.mark.usefixtures("own_surroundings")


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


def test_force_names_a_raster_that_is_gone_and_without_it_that_is_said(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)])
    files = Workspace(tmp_path).city("Town")
    before = files.imagery.read_bytes()
    photo.unlink()
    for dry_run in (True, False):
        with pytest.raises(MissingError, match=r"imagery of Town was made of .*not there any more: .*photo\.tif"):
            fetch("Town", root=tmp_path, force=True, dry_run=dry_run)
        kept = fetch("Town", root=tmp_path, dry_run=dry_run)
        assert f"imagery.tif is made of {photo}, which is not there any more" in " ".join(kept.notes)
    assert files.imagery.read_bytes() == before
    write_photo(photo)
    assert fetch("Town", root=tmp_path, force=True).status == "done"
    photo.write_bytes(photo.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"photo\.tif is cut off"):
        fetch("Town", root=tmp_path, force=True)


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


def test_a_fetch_that_failed_is_no_city_that_is_there(tmp_path: Path, town: Path, photo: Path) -> None:
    whole = photo.read_bytes()
    photo.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="cut off"):
        fetch("Town", root=tmp_path / "r", osm=[town], bbox=BBOX, imagery=[str(photo)])
    assert not list((tmp_path / "r").rglob("manifest.json"))  # told before anything was begun
    with pytest.raises(MissingError):  # no object there
        fetch("Town", root=tmp_path / "r", osm=[town], bbox=(50, 50, 50.01, 50.01))
    (city,) = cast("list[Result]", info(root=tmp_path / "r"))
    assert city.numbers["has"] == "unfinished (boundary); the same command again goes on"
    assert "The fetch of Town is unfinished" in cast("Result", info(root=tmp_path / "r", city="Town")).notes[0]
    photo.write_bytes(whole)
    fetch("Town", root=tmp_path / "r", osm=[town], bbox=BBOX, imagery=[str(photo)])
    (city,) = cast("list[Result]", info(root=tmp_path / "r"))
    assert city.numbers["has"] == "boundary, osm, imagery"


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


def test_a_city_keeps_its_place_until_the_elements_of_another_are_there(tmp_path: Path, town: Path) -> None:
    files = Workspace(tmp_path).city("Town")
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, offline=True)
    before = {path.name: path.read_bytes() for path in files.folder.iterdir() if path.is_file()}
    with pytest.raises(MissingError, match="no tagged OSM object"):
        fetch("Town", root=tmp_path, osm=[town], bbox=(50.0, 10.0, 50.009, 10.009), offline=True)
    broken = tmp_path / "broken.osm.pbf"
    broken.write_bytes(b"nothing")
    with pytest.raises(FormatError):
        fetch("Town", root=tmp_path, osm=[broken], bbox=(10.0, 50.0, 10.02, 50.02), offline=True)
    assert {path.name: path.read_bytes() for path in files.folder.iterdir() if path.is_file()} == before
    assert fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, offline=True).status == "skipped"
    wider = (*BBOX[:2], 10.02, 50.02)
    fetch("Town", root=tmp_path, osm=[town], bbox=wider, offline=True)
    assert read_place(files.place).geometry.bounds == pytest.approx(wider)


def test_a_change_that_breaks_half_way_is_unfinished(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)], offline=True)
    assert "next" in info_of("Town", tmp_path)
    with pytest.raises(SourceError):  # found only once the imagery of the new place is made
        fetch("Town", root=tmp_path, osm=[town], bbox=(*BBOX[:2], 10.02, 50.02), imagery=[NOBODY], offline=False)
    assert str(info_of("Town", tmp_path)["has"]).startswith("unfinished")
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)], offline=True)
    assert info_of("Town", tmp_path)["next"] == "rsosm build-graph --city Town"


def test_info_tells_an_image_that_does_not_fit_its_city(tmp_path: Path, town: Path, photo: Path) -> None:
    west, east = (*BBOX[:2], 10.0045, BBOX[3]), (10.0046, *BBOX[1:])
    write_photo(photo, box=west)
    fetch("Town", root=tmp_path, osm=[town], bbox=west, imagery=[str(photo)], offline=True)
    assert [n for n in notes_of("Town", tmp_path) if not n.startswith("Source")] == []
    moved = fetch("Town", root=tmp_path, osm=[town], bbox=east, offline=True)
    said = "reaches over 0 % of the present one: name other imagery with --imagery SOURCE"
    assert said in " ".join(moved.notes)
    assert said in " ".join(notes_of("Town", tmp_path))
    assert info_of("Town", tmp_path)["has"] == "boundary, osm, imagery of which nothing can be used"
    assert info_of("Town", tmp_path)["next"] == "rsosm fetch --city Town --imagery FILE"
    fetch("Town", root=tmp_path, osm=[town], bbox=west, imagery=[str(photo)], offline=True)
    photo.unlink()
    assert "photo.tif, which is not there any more" in " ".join(notes_of("Town", tmp_path))
    assert info_of("Town", tmp_path)["next"] == "rsosm fetch --city Town --imagery FILE"


@pytest.mark.parametrize("through", [False, True], ids=["itself", "a VRT of it"])
@pytest.mark.parametrize("epoch", [None, "2019"])
def test_an_image_is_not_made_of_an_image_of_its_city(
    tmp_path: Path, town: Path, photo: Path, epoch: str | None, through: bool
) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)], offline=True)
    image = source = tmp_path / "cities/town/imagery.tif"
    before = image.read_bytes()
    if through:
        source = tmp_path / "own.vrt"
        source.write_text(before.decode().replace(str(photo), str(image)))
    with pytest.raises(UsageError, match=r"cannot be made of .*imagery\.tif, .*Name what that was made of"):
        fetch("Town", root=tmp_path, imagery=[str(photo), str(source)], epoch=epoch, offline=True)
    assert image.read_bytes() == before


def test_info_tells_that_newer_imagery_was_broken_off(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)], offline=True)
    with pytest.raises(SourceError):
        fetch("Town", root=tmp_path, imagery=[NOBODY], force=True)
    (said,) = [note for note in notes_of("Town", tmp_path) if "broken off" in note]
    assert "imagery.tif is the one before it. To go on: rsosm fetch --city Town --imagery" in said
    assert str(info_of("Town", tmp_path)["next"]).startswith("rsosm fetch --city Town --imagery 'http")
    assert "broken off" in " ".join(fetch("Town", root=tmp_path).notes)
    fetch("Town", root=tmp_path, imagery=[str(photo)])  # which is there
    assert info_of("Town", tmp_path)["next"] == "rsosm build-graph --city Town"


def test_a_raster_that_was_moved_is_taken_from_its_new_place(tmp_path: Path, town: Path, photo: Path) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[str(photo)], offline=True)
    elsewhere = tmp_path / "elsewhere" / photo.name
    elsewhere.parent.mkdir()
    photo.rename(elsewhere)
    planned = fetch("Town", root=tmp_path, imagery=[str(elsewhere)], dry_run=True)
    assert "The imagery is there and unchanged." not in planned.notes
    assert fetch("Town", root=tmp_path, imagery=[str(elsewhere)]).status == "done"
    assert info_of("Town", tmp_path)["next"] == "rsosm build-graph --city Town"
    assert fetch("Town", root=tmp_path, imagery=[str(elsewhere)]).status == "skipped"


def test_what_goes_on_with_imagery_keeps_its_options(tmp_path: Path, town: Path) -> None:
    settings = FetchSettings(nodata=255, xyz_zoom=17, max_wait_s=1)
    with pytest.raises(SourceError):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[NOBODY], gsd=0.13, settings=settings)
    options = "--gsd 0.13 --nodata 255 --set xyz_zoom=17"
    assert str(info_of("Town", tmp_path)["next"]).endswith(options)
    assert options in " ".join(fetch("Town", root=tmp_path).notes)


def test_imagery_that_was_broken_off_is_not_forgotten(tmp_path: Path, town: Path, photo: Path) -> None:
    with pytest.raises(SourceError):
        fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, imagery=[f"{NOBODY}?key=secret"])
    further = "rsosm fetch --city Town --imagery 'http://127.0.0.1:9/{z}/{x}/{y}.png?key="
    for _ in range(2):
        said = str(info_of("Town", tmp_path)["next"])
        assert said.startswith(further)
        assert "secret" not in said
        without = fetch("Town", root=tmp_path)  # its boundary and elements are there, and finished by this
        assert "The imagery asked for before was broken off" in " ".join(without.notes)
    fetch("Town", root=tmp_path, imagery=[str(photo)])
    assert info_of("Town", tmp_path)["next"] == "rsosm build-graph --city Town"


def test_a_fetch_that_never_came_to_its_elements_goes_on_from_its_own_sources(tmp_path: Path, town: Path) -> None:
    elsewhere = (50.0, 10.0, 50.009, 10.009)
    with pytest.raises(MissingError, match="no tagged OSM object"):
        fetch("Town", root=tmp_path, osm=[town], bbox=elsewhere, offline=True)
    assert info_of("Town", tmp_path)["next"] == "rsosm fetch --city Town"
    with pytest.raises(MissingError, match=r"object of town\.osm in"):  # no other source is asked in its place
        fetch("Town", root=tmp_path, offline=True)
    assert fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, offline=True).status == "done"


@pytest.mark.parametrize("force", [True, False])
def test_other_elements_of_a_city_are_of_the_place_of_last_time(tmp_path: Path, town: Path, force: bool) -> None:
    fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, offline=True)
    other = tmp_path / "other.osm"
    other.write_text(document(node(1, 10.005, 50.005, amenity="bank"), node(2, 30.0, 10.0, shop="yes")))
    plan = fetch("Town", root=tmp_path, osm=[other], force=force, offline=True, dry_run=True)
    result = fetch("Town", root=tmp_path, osm=[other], force=force, offline=True)
    for notes in (plan.notes, result.notes):
        assert "The place is asked for as last time" in " ".join(notes)
    assert (result.numbers["points"], result.numbers["polygons"]) == (1, 0)
    assert read_place(Workspace(tmp_path).city("Town").place).geometry.bounds == BBOX
    assert fetch("Town", root=tmp_path, osm=[other], offline=True).status == "skipped"


def test_a_boundary_that_is_gone_is_named_where_other_elements_are_asked_for(tmp_path: Path, town: Path) -> None:
    boundary = tmp_path / "box.geojson"
    gpd.GeoSeries([shapely.box(*BBOX)], crs=4326).to_file(boundary)
    fetch("Town", root=tmp_path, osm=[town], boundary=boundary, offline=True)
    boundary.unlink()
    with pytest.raises(MissingError, match=r"box\.geojson, which is not there any more"):
        fetch("Town", root=tmp_path, osm=[town], offline=True)
    assert fetch("Town", root=tmp_path, osm=[town], bbox=BBOX, offline=True).status == "done"


NOBODY = "http://127.0.0.1:9/{z}/{x}/{y}.png"


def info_of(city: str, root: Path) -> dict[str, object]:
    rows = info(root=root)
    assert isinstance(rows, list)
    return next(row.numbers for row in rows if row.subject == city)


def notes_of(city: str, root: Path) -> tuple[str, ...]:
    told = info(root=root, city=city)
    assert isinstance(told, Result)
    return told.notes
