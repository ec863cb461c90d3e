"""STAC: a local HTTP server plays the API and serves small images; least cloudy, median, bands, trouble."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from command_line import call
from map_services import Reply, Services, serving
from osm_documents import document as osm_document
from osm_documents import node
from stac_services import MIDDLE, SIDE, UTM, cog, document, item, offer, offer_pages, offer_stac

from rsosm_cli import client
from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.imagery import raster, stac, stac_search
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


def windows_written(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the names of the windows that are kept from now on."""
    names: set[str] = set()
    usual = stac.atomic

    def noted(path: Path) -> Any:
        if path.suffix == ".npy":
            names.add(path.name)
        return usual(path)

    monkeypatch.setattr(stac, "atomic", noted)
    return names


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


def cloudy(services: Services, covers: list[float | None]) -> list[dict[str, Any]]:
    """Return images of all the place with these shares of clouds, the files of which are those of c."""
    model = item(services, "c", 0, 200)
    features = []
    for number, cover in enumerate(covers):
        properties = {**model["properties"], "eo:cloud_cover": cover}
        if cover is None:
            del properties["eo:cloud_cover"]
        features.append({**model, "id": f"i{number:04d}", "properties": properties})
    return features


EXTENSIONS = [("query", "sort"), ("filter", "sort"), ("query",), ("sort",), ()]


@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_the_least_cloudy_is_found_wherever_it_stands(
    services: Services, tmp_path: Path, extensions: tuple[str, ...]
) -> None:
    covers = [60.0] * 120 + [19.0] * 130 + [2.0] + [90.0] * 20
    offer_pages(services, cloudy(services, list(covers)), extensions, page=50)
    info = compose(services, tmp_path)
    assert info.sources[0]["items"] == "i0250"
    assert not any("stac_items" in note for note in info.notes)  # it covers the place alone
    searches = [form for path, form in services.asked if path == "/stac/search"]
    asked = {("query", "sort"): 3, ("filter", "sort"): 3, ("sort",): 3, ("query",): 3, (): 6}  # pages of 50
    assert len(searches) == asked[extensions]
    shutil.rmtree(tmp_path / "imagery")
    info = compose(services, tmp_path, stac_mosaic="median", stac_items=2)
    assert info.sources[0]["items"] == "i0250, i0120"
    assert any("more images of the place than the 2 least cloudy ones that are taken" in note for note in info.notes)


def test_what_is_not_looked_at_is_told(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stac_search, "_LOOKED_AT", 60)
    offer_pages(services, cloudy(services, [15.0] * 100 + [0.0]), page=25)
    info = compose(services, tmp_path)
    assert any("has more than 60 images of the place" in note and "Narrow --dates" in note for note in info.notes)
    assert len([form for path, form in services.asked if path == "/stac/search"]) == 3


def test_images_that_do_not_tell_their_clouds_are_found(services: Services, tmp_path: Path) -> None:
    offer_pages(services, cloudy(services, [None, None]), ("query", "sort"))
    assert compose(services, tmp_path).sources[0]["items"] == "i0000"


def test_an_api_that_sorts_is_not_asked_for_all_its_cloudy_images(services: Services, tmp_path: Path) -> None:
    offer_pages(services, cloudy(services, [40.0 + i / 100 for i in range(500)]), ("query", "sort"))
    with pytest.raises(MissingError, match=r"at most 20 % of clouds; the least cloudy has 40 %"):
        compose(services, tmp_path)
    assert len([form for path, form in services.asked if path == "/stac/search"]) == 2


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_median_in_strips_is_that_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type[np.generic]
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 60_000, (2, 30, 40)).astype(dtype) for _ in range(6)]
    valid = [rng.random((30, 40)) > 0.6 for _ in images]
    pairs = dict(enumerate(zip(images, valid, strict=True)))
    monkeypatch.setattr(stac, "_image", lambda number, *_: pairs[number])
    monkeypatch.setattr(stac, "_STACK_BYTES", 7 * 40 * 4 * 6)  # seven rows at a time
    found = stac.read_median(list(pairs), ["a", "b"], SimpleNamespace(shape=(30, 40)), tmp_path / "parts")
    there = np.any(valid, axis=0)
    stack = np.where(np.stack(valid)[:, None], np.stack(images), np.nan)
    stack[:, :, ~there] = 0
    expected = np.nanmedian(stack, axis=0)
    assert found.dtype == dtype
    assert not there.all()
    np.testing.assert_array_equal(found[-1], there)
    np.testing.assert_array_equal(found[:-1], np.rint(expected) if dtype is np.uint16 else expected)
    assert not list((tmp_path / "parts").iterdir())


def test_the_memory_of_a_median_does_not_grow_with_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((3, 256, 256), 700, np.uint16), np.ones((256, 256), bool)
    monkeypatch.setattr(stac, "_image", lambda *_: image)
    monkeypatch.setattr(stac, "_STACK_BYTES", 1 << 20)
    peaks = []
    for count in (10, 100):
        tracemalloc.start()
        stac.read_median(range(count), ["a", "b", "c"], SimpleNamespace(shape=(256, 256)), tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 12e6


def test_a_median_of_chosen_bands(services: Services, tmp_path: Path) -> None:
    compose(services, tmp_path, stac_mosaic="median", stac_clouds=50, bands=("nir", "red"))
    pixels = raw(tmp_path)
    width = pixels.shape[2]
    assert pixels.shape[0] == 2
    assert set(np.unique(pixels[0, :, : width // 2 - 20])) == {4100}  # of 4000, 4100, 4200
    assert set(np.unique(pixels[1, :, width // 2 + 20 :])) == {1100}  # of 1000 and 1200


def test_what_cannot_be_had_is_one_sentence(services: Services, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"at most 0.5 % of clouds; the least cloudy has 1 %"):
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
    written = windows_written(monkeypatch)
    clean = compose(services, tmp_path / "clean")
    all_windows = set(written)
    whole = services.files["/images/c-green.tif"]
    services.files["/images/c-green.tif"] = whole[: len(whole) // 2]
    with pytest.raises(SourceError, match=r"The image c of 127\.0\.0\.1:\d+ cannot be read") as error:
        compose(services, tmp_path / "broken")
    assert "http" not in str(error.value)
    assert not (tmp_path / "broken/imagery.tif").exists()
    kept = {p.name for p in (tmp_path / "broken/imagery").rglob("*.npy")}
    assert kept
    services.files["/images/c-green.tif"] = whole
    written.clear()
    again = compose(services, tmp_path / "broken")
    assert again.notes == clean.notes
    np.testing.assert_array_equal(raw(tmp_path / "broken"), raw(tmp_path / "clean"))
    assert written == all_windows - kept
    assert not list(tmp_path.rglob("*.npy"))  # once they are one raster


_SCRIPT = """
import sys
from pathlib import Path
import shapely
from rsosm_cli.imagery import raster, stac, stac_search
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
    written = windows_written(monkeypatch)
    compose(services, tmp_path / "clean")
    all_windows = set(written)
    killed = tmp_path / "killed"
    services.files = hanging = _Hanging(services.files, lambda: len(list(killed.rglob("*.npy"))) >= 3)
    source = f"stac:http://127.0.0.1:{services.server_port}/stac#photos"
    command = [sys.executable, "-c", _SCRIPT, source, str(killed), *map(str, PLACE.bounds)]
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
    assert hanging.reached.wait(60)
    process.kill()
    process.wait()
    hanging.release.set()
    kept = {p.name for p in killed.rglob("*.npy")}
    assert 3 <= len(kept) < len(all_windows)
    assert not (killed / "imagery.tif").exists()
    written.clear()
    compose(services, killed)
    assert written == all_windows - kept
    assert sorted(p.name for p in killed.rglob("*")) == sorted(p.name for p in (tmp_path / "clean").rglob("*"))
    one, other = (next((tmp_path / name / "imagery").glob("stac-*.tif")) for name in ("clean", "killed"))
    assert one.read_bytes() == other.read_bytes()
    assert sum(path == "/stac/search" for path, _ in services.asked) + sum(
        path == "/stac/search" for _, path, _ in services.ranges
    ) == 1  # the search is kept  # fmt: skip


def test_bands_by_name_through_the_command(services: Services, tmp_path: Path) -> None:
    town = tmp_path / "town.osm"
    west, south = MIDDLE[:2]
    town.write_text(osm_document(node(1, west + 0.001, south + 0.001, amenity="cafe")))
    asked = ["--root", str(tmp_path), "fetch", "--city", "Town", "--osm", str(town), "--bbox", *map(str, MIDDLE)]
    asked += ["--bands", "nir,red", "--imagery", f"stac:{services.address}/stac#photos"]
    for more in (["--dry-run"], []):
        status, _, err = call(*asked, *more)
        assert status == 0, err
    with rasterio.open(tmp_path / "cities/town/imagery.tif") as image:
        assert image.count == 3  # with alpha


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
