"""STAC: a local HTTP server plays the API and serves small images; least cloudy, median, bands, trouble."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from map_services import Reply, Services, serving
from osm_documents import document as osm_document
from osm_documents import node
from stac_services import MIDDLE, SIDE, UTM, cog, document, offer, offer_stac

from rsosm_cli import client
from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.imagery import raster, stac
from rsosm_cli.imagery.prepare import ImageryInfo, prepare_imagery
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.settings import FetchSettings

PLACE = shapely.box(*MIDDLE)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSOSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.0001)
    monkeypatch.setitem(stac._GDAL, "GDAL_HTTP_MAX_RETRY", "0")
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def services() -> Iterator[Services]:
    with serving() as server:
        offer_stac(server)
        yield server


def compose(services: Services, folder: Path, **values: Any) -> ImageryInfo:
    source = f"stac:http://127.0.0.1:{services.server_port}/stac#photos"
    return prepare_imagery(
        [source], PLACE, folder, folder / "imagery.tif", gsd_m=None, settings=services.settings(**values)
    )


def raw(folder: Path) -> np.ndarray:
    with rasterio.open(next((folder / "imagery").glob("stac-*.tif"))) as image:
        return image.read()


def test_the_least_cloudy_is_on_top(services: Services, tmp_path: Path) -> None:
    info = compose(services, tmp_path, stac_dates="2023-06-01/2023-06-30")
    pixels = raw(tmp_path)
    assert pixels.shape[0] == 3
    width = pixels.shape[2]
    assert set(np.unique(pixels[0, :, : width // 2 - 20])) == {1100}  # b has 1 % of clouds, and only the west
    assert set(np.unique(pixels[0, :, width // 2 + 20 :])) == {1200}  # then c; a is too cloudy
    assert info.bands == 3
    assert info.stretch is not None
    assert info.crs == UTM
    credit = info.sources[0]
    assert (credit["name"], credit["licence"], credit["attribution"]) == ("Test photos", "CC-BY-4.0", "A space agency")
    assert credit["items"] == "b, c"
    asked = [form for path, form in services.asked] + [p for _, p, _ in services.ranges]
    assert "/stac/search" in asked
    assert "2 images of Test photos, 2023-06-02 to 2023-06-03, at most 5 % of clouds" in " ".join(info.notes)


def test_a_median_of_chosen_bands(services: Services, tmp_path: Path) -> None:
    compose(services, tmp_path, stac_mosaic="median", stac_clouds=50, bands=("nir", "red"))
    pixels = raw(tmp_path)
    width = pixels.shape[2]
    assert pixels.shape[0] == 2
    assert set(np.unique(pixels[0, :, : width // 2 - 20])) == {4100}  # of 4000, 4100, 4200
    assert set(np.unique(pixels[1, :, width // 2 + 20 :])) == {1100}  # of 1000 and 1200


def test_what_cannot_be_had_is_one_sentence(services: Services, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"at most 0.5 % of clouds; the least cloudy of 3 has 1 %"):
        compose(services, tmp_path, stac_clouds=0.5)
    with pytest.raises(UsageError, match=r"no band swir.*blue, green, nir, red"):
        compose(services, tmp_path, bands=("swir",))
    offer(services, [])
    with pytest.raises(MissingError, match="has no image of the place in 2019"):
        compose(services, tmp_path, stac_dates="2019")
    with pytest.raises(UsageError, match="names no collection"):
        prepare_imagery(
            ["stac:https://host/v1"], PLACE, tmp_path, tmp_path / "i.tif", gsd_m=None, settings=FetchSettings()
        )
    del services.files["/stac/collections/photos"]
    shutil.rmtree(tmp_path / "cache")  # a search is kept for a week
    with pytest.raises(SourceError, match="404"):
        compose(services, tmp_path / "x", max_wait_s=1)


def test_an_api_that_is_none(services: Services, tmp_path: Path) -> None:
    for number, content in enumerate(({"hello": 1}, {"type": "Catalog", "links": "none"})):
        document(services, "/stac", content)
        with pytest.raises(SourceError, match="does not answer as one"):
            compose(services, tmp_path / str(number))
        for file in (tmp_path / "cache" / "http").glob("*.json"):
            file.unlink()


def test_an_image_that_breaks_off_is_one_sentence_and_a_second_run_goes_on(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stac, "_WINDOW_PX", 64)
    noise = np.random.default_rng(0).integers(1, 9000, (1, SIDE, SIDE)).astype(np.uint16)
    services.files["/images/c-green.tif"] = cog(0, pixels=noise)
    clean = compose(services, tmp_path / "clean")
    whole = services.files["/images/c-green.tif"]
    services.files["/images/c-green.tif"] = whole[: len(whole) // 2]
    with pytest.raises(SourceError, match=r"The image c of 127\.0\.0\.1:\d+ cannot be read") as error:
        compose(services, tmp_path / "broken")
    assert "http" not in str(error.value)
    assert not (tmp_path / "broken/imagery.tif").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "broken/imagery").rglob("*.npy")}
    assert kept
    services.files["/images/c-green.tif"] = whole
    again = compose(services, tmp_path / "broken")
    assert again.notes == clean.notes
    np.testing.assert_array_equal(raw(tmp_path / "broken"), raw(tmp_path / "clean"))
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "broken/imagery").rglob("*.npy")}
    assert {name: now[name] for name in kept} == kept


_SCRIPT = """
import sys
from pathlib import Path
import shapely
from rsosm_cli.imagery import raster, stac
from rsosm_cli.imagery.prepare import prepare_imagery
from rsosm_cli.settings import FetchSettings
source, folder, *box = sys.argv[1:]
stac._WINDOW_PX = 64
prepare_imagery([source], shapely.box(*map(float, box)), Path(folder), Path(folder) / "imagery.tif", gsd_m=None,
                settings=FetchSettings())
"""


class _Hanging(dict[str, bytes]):
    """Files of which the images do not come any more once ``enough`` says so, until ``release`` is set."""

    def __init__(self, files: dict[str, bytes], enough: Callable[[], bool]) -> None:
        super().__init__(files)
        self.enough, self.reached, self.release = enough, threading.Event(), threading.Event()

    def __getitem__(self, path: str) -> bytes:
        if path.startswith("/images/") and self.enough() and not self.release.is_set():
            self.reached.set()
            self.release.wait(30)
        return super().__getitem__(path)


def test_after_kill_9_a_second_run_reads_only_the_windows_that_are_missing(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stac, "_WINDOW_PX", 64)
    noise = np.random.default_rng(0).integers(1, 9000, (1, SIDE, SIDE)).astype(np.uint16)
    for name in "bc":
        services.files[f"/images/{name}-green.tif"] = cog(0, pixels=noise)
    compose(services, tmp_path / "clean")
    killed = tmp_path / "killed"
    services.files = hanging = _Hanging(services.files, lambda: len(list(killed.rglob("*.npy"))) >= 3)
    source = f"stac:http://127.0.0.1:{services.server_port}/stac#photos"
    command = [sys.executable, "-c", _SCRIPT, source, str(killed), *map(str, PLACE.bounds)]
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
    assert hanging.reached.wait(60)
    process.kill()
    process.wait()
    hanging.release.set()
    kept = {p.name: p.stat().st_mtime_ns for p in killed.rglob("*.npy")}
    windows = len(list((tmp_path / "clean").rglob("*.npy")))
    assert 3 <= len(kept) < windows
    assert not (killed / "imagery.tif").exists()
    compose(services, killed)
    now = {p.name: p.stat().st_mtime_ns for p in killed.rglob("*.npy")}
    assert len(now) == windows
    assert {name: now[name] for name in kept} == kept
    one, other = (next((tmp_path / name / "imagery").glob("stac-*.tif")) for name in ("clean", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert sum(path == "/stac/search" for path, _ in services.asked) + sum(
        path == "/stac/search" for _, path, _ in services.ranges
    ) == 1  # the search is kept  # fmt: skip


def _fetch_in_process(root: Path, cache: Path, town: Path, source: str, answers: multiprocessing.Queue[str]) -> None:
    os.environ["RSOSM_CACHE"] = str(cache)
    answers.put(fetch("Town", root=root, osm=[town], bbox=MIDDLE, imagery=[source]).status)


def test_two_processes_make_one_download(services: Services, tmp_path: Path) -> None:
    """Both succeed, and the server is asked for no more than by one alone."""
    town = tmp_path / "town.osm"
    west, south = MIDDLE[:2]
    town.write_text(osm_document(node(1, west + 0.001, south + 0.001, amenity="cafe")))
    source = f"stac:{services.address}/stac#photos"
    context = multiprocessing.get_context("spawn")
    asked, found = [], []
    for number in (1, 2):
        services.ranges.clear()
        folder = tmp_path / str(number)
        answers: multiprocessing.Queue[str] = context.Queue()
        given = (folder / "data", folder / "cache", town, source, answers)
        processes = [context.Process(target=_fetch_in_process, args=given) for _ in range(number)]
        for process in processes:
            process.start()
        found.append(sorted(answers.get(timeout=120) for _ in processes))
        for process in processes:
            process.join()
        asked.append(Counter(services.ranges))
    assert found == [["done"], ["done", "skipped"]]
    assert asked[0] == asked[1]
    assert any(path.startswith("/images/") for _, path, _ in asked[0])
    one, other = (next(tmp_path.glob(f"{number}/data/cities/town/imagery/stac-*.tif")) for number in (1, 2))
    assert one.read_bytes() == other.read_bytes()


def test_an_api_that_drips_ends(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.1 - client._TIMEOUT_S[1])
    monkeypatch.setattr(client, "_TRIES", 2)
    services.trouble = [Reply(services.files["/stac"], drip=0.01)] * 2
    with pytest.raises(SourceError, match=r"The STAC API at .*the answer was not whole in time, after 2 tries"):
        compose(services, tmp_path)
    assert compose(services, tmp_path).count == 2


def test_an_image_that_drips_ends_and_its_address_is_never_told(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(stac._GDAL, "GDAL_HTTP_TIMEOUT", "1")
    services.trouble = [*_documents(services), *[Reply(services.files["/images/c-red.tif"], drip=0.05)] * 60]
    with pytest.raises(SourceError, match=r"The image \w of 127\S+ cannot be read: (its server|a file of it)"):
        compose(services, tmp_path)
    assert "/images/" not in caplog.text


def _documents(services: Services) -> list[Reply]:
    return [Reply(services.files[path]) for path in ("/stac", "/stac/collections/photos", "/stac/search")]


def test_without_the_packages_it_says_what_to_install(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pystac_client", None)
    with pytest.raises(UsageError, match=r"pip install 'rsosm\[stac\]'"):
        compose(services, tmp_path)
