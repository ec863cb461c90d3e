"""XYZ services: a local HTTP server plays one, and misbehaves on demand."""

from __future__ import annotations

import errno
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from tile_services import (
    PLACE,
    SCRIPT,
    TILE_PX,
    ZOOM,
    Answer,
    Service,
    fetch,
    kill_in_the_middle,
    pixels_of,
    png,
    serving_tiles,
    tile,
    vast_png,
)

from rsosm_cli.errors import DiskError, SourceError, UsageError
from rsosm_cli.geometry import Projection
from rsosm_cli.imagery import prepare, tile_client
from rsosm_cli.imagery.reader import ImageReader
from rsosm_cli.imagery.tile_grid import HALF_WORLD_M
from rsosm_cli.imagery.tile_set import tiles_over, zoom_for
from rsosm_cli.progress import Advance
from rsosm_cli.settings import FetchSettings


@pytest.fixture
def service() -> Iterator[Service]:
    with serving_tiles() as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)


def test_every_pixel_of_every_tile_is_where_the_service_has_it(service: Service, tmp_path: Path) -> None:
    info = fetch(tmp_path, service.template)
    assert (info.kind, info.crs, info.bands, info.missing) == ("cog", "EPSG:3857", 3, [])
    assert info.count == len(service.asked) == sum(service.asked.values())  # none twice
    with rasterio.open(info.path) as image:
        assert image.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert image.res[0] == pytest.approx(2 * HALF_WORLD_M / 2**ZOOM / TILE_PX)
        for z, x, y in service.asked:
            side = 2 * HALF_WORLD_M / 2**z
            row, col = image.index(x * side - HALF_WORLD_M + 0.01, HALF_WORLD_M - y * side - 0.01)
            read = image.read(window=((row, row + TILE_PX), (col, col + TILE_PX)))
            np.testing.assert_array_equal(read[:3], pixels_of(x, y).transpose(2, 0, 1))
            assert (read[3] == 255).all() or not read[3].all()
    assert all(agent.startswith("rsosm/") for agent in service.agents)


def test_the_terms_of_use_are_said(service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="rsosm")
    info = fetch(tmp_path, service.template)
    assert "Its terms of use apply to it and to what is derived from it." in caplog.text
    assert info.sources[0]["licence"].startswith("terms of use of 127.0.0.1")


def test_the_record_beside_an_image_does_not_say_where_the_city_lies(service: Service, tmp_path: Path) -> None:
    info = fetch(tmp_path, service.template)
    record = (tmp_path / "imagery/info.json").read_text()
    assert str(tmp_path) not in record
    assert {"crs", "bands", "missing"} <= set(json.loads(record))
    assert re.search(r"[0-9.]+ kB of tiles stay in the city's imagery/xyz-", " ".join(info.notes))


def test_the_image_covers_the_place_and_the_margin_of_its_outer_tiles(service: Service, tmp_path: Path) -> None:
    info = fetch(tmp_path, service.template)
    with ImageReader(info.path) as reader:
        box = rasterio.warp.transform_bounds("EPSG:4326", "EPSG:32645", *PLACE.bounds)
        projection = Projection("EPSG:32645", 2.0)
        _, valid = reader.read(projection, projection.pixels_around(*box).padded(70))  # 140 m
    assert valid.all()


def test_alpha_grey_and_palette_tiles(service: Service, tmp_path: Path) -> None:
    grey = np.arange(TILE_PX**2, dtype=np.uint8).reshape(TILE_PX, TILE_PX)
    clear = np.concatenate([pixels_of(0, 0), np.full((TILE_PX, TILE_PX, 1), 255, np.uint8)], axis=2)
    clear[:10, :, 3] = 0

    def answer(z: int, x: int, y: int, n: int) -> Answer:
        return 200, {}, png(grey if x % 2 else clear)

    service.answer = answer
    info = fetch(tmp_path, service.template, xyz_placeholders=False)
    with rasterio.open(info.path) as image:
        bands = image.read()
    columns = bands.shape[2] // TILE_PX
    corner = next(iter(sorted(x for _, x, _ in service.asked)))
    cells = {c: bands[:, TILE_PX : 2 * TILE_PX, c * TILE_PX : (c + 1) * TILE_PX] for c in range(columns)}
    for c, cell in cells.items():
        if (corner + c) % 2:
            np.testing.assert_array_equal(cell[:3], np.stack([grey] * 3))
        else:
            assert not cell[:, :10].any()
            np.testing.assert_array_equal(cell[:3, 10:], clear[10:, :, :3].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {}, b"slow down"),
        (429, {"Retry-After": "0"}, b"slow down"),
        (503, {"Retry-After": formatdate(0, usegmt=True)}, b""),
        (504, {}, b"<html>gateway</html>"),
        (200, {"Content-Length": "999999"}, b"\x89PNG cut"),
        (200, {}, png(pixels_of(1, 1))[:400]),
        (200, {}, b""),
        "reset",
    ],
    ids=["429", "429-retry-after", "503-date", "504", "short-body", "truncated-image", "empty", "reset"],
)
def test_passing_trouble_ends_in_the_same_image(service: Service, tmp_path: Path, trouble: Answer | str) -> None:
    clean = fetch(tmp_path / "clean", service.template).path.read_bytes()
    service.asked.clear()
    service.answer = lambda z, x, y, n: trouble if (x + y) % 4 == 0 and n == 0 else tile(x, y)
    info = fetch(tmp_path / "troubled", service.template)
    assert info.path.read_bytes() == clean
    assert max(service.asked.values()) == 2


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>log in</html>"), r"web page \(text/html\), not an image"),
        ((200, {"Content-Type": "application/json"}, b'{"error": 1}'), r"something else \(application/json\)"),
        ((401, {}, b""), "status 401. Is the key right"),
        ((403, {}, b""), "status 403. Is the key right"),
        ((400, {}, b""), "with status 400"),
        ((406, {}, b""), "with status 406"),
        ((302, {"Location": "/17/1/1.png"}, b""), "asked for tile .*: it redirects in a circle"),
        ((302, {"Location": "http://[::1"}, b""), "asked for tile .*: .* is not a URL"),
        (
            (302, {"Location": "http://127.0.0.1:9/a?apikey=tell-nobody"}, b""),
            r"redirects to http://127\.0\.0\.1:9, and",
        ),
        ((302, {"Location": "/\xff"}, b""), "asked for tile .*: .* is not a URL"),
        ((200, {"Content-Type": "image/png"}, vast_png(60_000)), "with a picture of far too many pixels"),
        ((200, {"Content-Type": "image/png"}, vast_png(12_000)), "with a picture of far too many pixels"),
        ((200, {"Content-Type": "image/png"}, vast_png(5_000)), "with a picture of 5,000 x 5,000 pixels"),
        ((429, {"Retry-After": "\xb2"}, b""), "did not deliver in 6 tries: status 429"),
        ((200, {}, b""), "has no tiles over the place at zoom 17"),
        ((429, {"Retry-After": "3600"}, b""), "waiting another 60 min would exceed the 5 s allowed"),
        ((429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, b""), "waiting another [0-9,]+ days would exceed"),
        ((500, {}, b""), "did not deliver in 6 tries: status 500"),
        ("endless", "sends more than 16 MiB for one tile"),
        ((404, {}, b""), "has no tiles over the place at zoom 17"),
    ],
)
def test_lasting_trouble_is_one_sentence_without_a_key(
    service: Service, tmp_path: Path, trouble: Answer | str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.answer = lambda z, x, y, n: trouble
    caplog.set_level(logging.INFO, logger="rsosm")
    with pytest.raises(SourceError, match=sentence) as caught:
        fetch(tmp_path, service.template + "?apikey=tell-nobody")
    assert "tell-nobody" not in f"{caught.value}{caught.value.data}{caught.value.__cause__}{caplog.text}"
    assert not (tmp_path / "imagery.tif").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.plain.tif"))


def test_a_slow_drip_ends(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_client, "_TILE_S", 0.1)
    service.answer = lambda z, x, y, n: "drip" if n == 0 and (x + y) % 5 == 0 else tile(x, y)
    info = fetch(tmp_path, service.template)
    assert not info.missing


def test_nobody_at_home_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="did not deliver in 6 tries: nobody answers at that address"):
        fetch(tmp_path, "http://127.0.0.1:9/{z}/{x}/{y}.png")


@pytest.mark.parametrize("asked", ["0", "Mon, 01 Jan 2024 00:00:00 GMT", "soon"])
def test_a_busy_service_that_names_no_wait_is_given_time(
    service: Service, tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.05)
    begun = time.monotonic()
    service.answer = lambda z, x, y, n: (429, {"Retry-After": asked}, b"")
    with pytest.raises(SourceError, match="did not deliver in 6 tries: status 429"):
        fetch(tmp_path, service.template)
    assert time.monotonic() - begun > 0.05 * (1 + 2 + 4 + 8 + 16)


def test_a_contact_in_any_script_is_sent_as_far_as_a_header_can_hold_it(service: Service, tmp_path: Path) -> None:
    fetch(tmp_path, service.template, contact="张三 <me@example.org>")
    assert all("(<me@example.org>)" in agent for agent in service.agents)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_place_beyond_the_tiling_is_one_sentence(service: Service, tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(UsageError, match=r"lies beyond 85\.05 degrees of latitude"):
        prepare.prepare_imagery(
            [service.template], shapely.box(20, 86, 20.1, 86.1), tmp_path, tmp_path / "imagery.tif", gsd_m=10,
            settings=FetchSettings(), dry_run=dry_run,
        )  # fmt: skip
    assert not service.asked


def test_waits_are_announced(service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service.answer = lambda z, x, y, n: (
        (429, {"Retry-After": "1"}, b"") if sum(service.asked.values()) == 1 else tile(x, y)
    )
    caplog.set_level(logging.WARNING, logger="rsosm")
    fetch(tmp_path, service.template)
    assert re.search(r"127\.0\.0\.1: status 429 for tile .*; waiting 1 s", caplog.text)


def test_a_second_run_asks_only_for_what_is_missing(service: Service, tmp_path: Path) -> None:
    wanted = list(tiles_over(prepare.place_margin(PLACE), ZOOM, TILE_PX).ids())
    service.answer = lambda z, x, y, n: (401, {}, b"") if (z, x, y) == wanted[-1] else tile(x, y)
    with pytest.raises(SourceError, match="401"):
        fetch(tmp_path, service.template, xyz_workers=1)
    had = set(service.asked) - {wanted[-1]}
    assert len(had) > 5
    service.asked.clear()
    service.answer = lambda z, x, y, n: tile(x, y)
    fetch(tmp_path, service.template)
    assert had.isdisjoint(service.asked)
    service.asked.clear()
    fetch(tmp_path, service.template)
    assert not service.asked


def test_after_kill_9_a_second_run_completes_byte_for_byte(service: Service, tmp_path: Path) -> None:
    clean = fetch(tmp_path / "clean", service.template).path.read_bytes()
    service.asked.clear()
    kept = kill_in_the_middle(service, service.template, tmp_path / "killed")
    assert 2 <= len(kept) <= 5
    assert not (tmp_path / "killed" / "imagery.tif").exists()
    assert fetch(tmp_path / "killed", service.template).path.read_bytes() == clean
    assert kept.isdisjoint(service.asked)


def test_two_at_once_download_once(service: Service, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(fetch, tmp_path, service.template) for _ in range(2)]
        infos = [run.result() for run in runs]
    assert infos[0] == infos[1]
    assert set(service.asked.values()) == {1}


class Watched:
    """Answers slowly, and counts."""

    def __init__(self) -> None:
        self.begun: list[float] = []  # when each request came
        self.now = self.most = 0  # at a time
        self._lock = threading.Lock()

    def __call__(self, z: int, x: int, y: int, n: int) -> Answer:
        with self._lock:
            self.begun.append(time.monotonic())
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.1)
        with self._lock:
            self.now -= 1
        return tile(x, y)

    @property
    def seconds(self) -> float:
        return max(self.begun) - min(self.begun)


def test_rate_and_concurrency_are_kept(service: Service, tmp_path: Path) -> None:
    service.answer = watched = Watched()
    fetch(tmp_path, service.template, xyz_workers=2, xyz_rate=20)
    assert watched.most <= 2
    assert watched.seconds >= (len(watched.begun) - 1) / 20 * 0.5  # the first may come late


def test_an_interruption_stays_one(service: Service, tmp_path: Path) -> None:
    """The threads that it ends, waiting for their turns, fail with an error of their own."""

    class Interrupting:
        @contextmanager
        def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
            told: list[float] = []

            def advance(units: float = 1, /) -> None:
                told.append(units)
                if len(told) == 2:  # first, how many are there already
                    raise KeyboardInterrupt

            yield advance

    settings = FetchSettings(xyz_zoom=ZOOM, xyz_rate=3.0, xyz_workers=4)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_imagery(
            [service.template], PLACE, tmp_path, tmp_path / "imagery.tif", gsd_m=0.6, settings=settings,
            progress=Interrupting(),
        )  # fmt: skip


def test_pictures_of_one_pixel_are_no_image(service: Service, tmp_path: Path) -> None:
    clear = (200, {"Content-Type": "image/png"}, png(np.zeros((1, 1, 4), np.uint8)))
    usual = service.answer
    service.answer = lambda z, x, y, n: clear if (x + y) % 5 == 0 else usual(z, x, y, n)
    info = fetch(tmp_path / "some", service.template)
    assert 0 < len(info.missing) < len(service.asked)
    service.answer = lambda z, x, y, n: clear
    with pytest.raises(SourceError, match="has no tiles over the place"):
        fetch(tmp_path / "all", service.template)


def test_two_processes_at_once_download_once(service: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, service.template, str(tmp_path), *map(str, PLACE.bounds)]
    root = Path(__file__).resolve().parents[1]
    both = [subprocess.Popen(command, cwd=root) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert service.asked
    assert set(service.asked.values()) == {1}


def test_processes_share_rate_and_places_and_a_killed_one_keeps_none(service: Service, tmp_path: Path) -> None:
    kill_in_the_middle(service, service.template, tmp_path / "killed")
    service.answer = watched = Watched()
    script = SCRIPT.replace("xyz_rate=5000", "xyz_rate=20, xyz_workers=2")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", script, service.template]
    runs = [subprocess.Popen([*command, str(tmp_path / str(i)), *map(str, PLACE.bounds)], cwd=root) for i in range(3)]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    assert len(watched.begun) == 3 * len(service.asked)  # a folder each
    assert watched.most <= 2
    assert watched.seconds >= (len(watched.begun) - 1) / 20 * 0.8
    assert max(np.diff(sorted(watched.begun))) < 5


_SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))"


def test_a_full_disk_is_a_sentence_and_leaves_no_half_file(service: Service, tmp_path: Path) -> None:
    script = _SMALL_FILES + SCRIPT.replace(
        "prepare_imagery([", "from rsosm_cli.errors import DiskError\ntry: prepare_imagery(["
    )
    script += "except DiskError as error: print(error)\n"
    command = [sys.executable, "-c", script, service.template, str(tmp_path), *map(str, PLACE.bounds)]
    run = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)
    assert re.search(r"imagery\.tif was not written: .* Is the disk full\?", run.stdout), run.stderr
    assert not [p for p in tmp_path.iterdir() if p.is_file()]


def test_a_full_disk_among_the_tiles_names_their_folder(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, write, lock = [3], Path.write_bytes, threading.Lock()

    def write_bytes(path: Path, data: bytes) -> int:
        with lock:
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(DiskError, match=r"full: the tiles of 127\.0\.0\.1 were not all written to .*/xyz-") as caught:
        fetch(tmp_path, service.template)
    assert "the tiles fetched so far are kept" in caught.value.hint
    room[0] = 1000
    asked = set(service.asked)
    service.asked.clear()
    assert not fetch(tmp_path, service.template).missing
    assert len(asked - set(service.asked)) == 3


def test_zoom_and_tile_size_follow_from_the_gsd(service: Service, tmp_path: Path) -> None:
    assert zoom_for(0.6, 256, 0.0) == 18  # 0.597 m at the equator
    assert zoom_for(0.6, 512, 0.0) == 17
    assert zoom_for(0.6, 256, 60.0) == 17  # half as large on the ground
    service.answer = lambda z, x, y, n: (200, {}, png(pixels_of(x, y, 512)))
    info = fetch(
        tmp_path, service.template, place=shapely.box(85.5205, 27.6305, 85.521, 27.631), xyz_zoom=None, gsd_m=2.0
    )
    with rasterio.open(info.path) as image:
        ground = image.res[0] * np.cos(np.radians(27.63))
    assert 1.0 < ground <= 2.1
    assert any("512 px" in note for note in info.notes)


def test_dry_run_asks_nobody(service: Service, tmp_path: Path) -> None:
    folder = tmp_path / "city"
    info = prepare.prepare_imagery(
        [service.template], PLACE, folder, folder / "imagery.tif", gsd_m=0.6, settings=FetchSettings(), dry_run=True
    )
    assert not service.asked
    assert not folder.exists()
    assert info.kind == "cog"
    assert info.count > 20
    assert info.size_bytes > 20 * 256**2 / 8
    assert re.search(r"about [1-9][0-9.]* kB to download", info.notes[0])
