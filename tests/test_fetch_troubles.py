"""Every misbehaviour of every service, at the level of the command: success after retries, or one sentence."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
from all_services import TOWN, All, serving_all
from command_line import call
from map_services import Reply, Upset
from tile_services import PLACE

from rsosm_cli import client
from rsosm_cli.client import Client
from rsosm_cli.imagery import raster, stac, tile_client
from rsosm_cli.imagery.raster import GDAL_NETWORK
from rsosm_cli.osm import overpass

KEY = "open-sesame-4711"
BOX = ["--bbox", *map(str, PLACE.bounds)]
FILES = ("place.geojson", "osm.parquet", "imagery.tif")
MAX_WAIT_S = 30.0
NUMBERS = itertools.count()  # of the runs: a folder of rasters each, as GDAL remembers addresses


class Service(NamedTuple):
    """How a service is asked: the options of ``fetch``, what finds its requests, and the file that comes of it."""

    options: list[str]
    pattern: str
    file: str


def _image(source: str) -> list[str]:
    return [*BOX, "--osm", "{town}", "--imagery", source, "--set", "xyz_zoom=17"]


SERVICES = {
    "nominatim": Service(["--boundary", "nominatim", "--osm", "{town}"], r"/nominatim/", "place.geojson"),
    "overpass-count": Service([*BOX, "--osm", "overpass"], r"/api/.*out count", "osm.parquet"),
    "overpass": Service([*BOX, "--osm", "overpass"], r"/api/.*out:xml", "osm.parquet"),
    "index": Service([*BOX, "--osm", "geofabrik"], r"/index-v1", "osm.parquet"),
    "extract-size": Service([*BOX, "--osm", "geofabrik"], r"^HEAD /land", "osm.parquet"),
    "extract-checksum": Service([*BOX, "--osm", "geofabrik"], r"\.md5", "osm.parquet"),
    "extract": Service([*BOX, "--osm", "geofabrik"], r"^GET /land.*pbf ", "osm.parquet"),
    "xyz": Service(_image("{address}/xyz/{z}/{x}/{y}.png?key={MY_KEY}"), r"/xyz/", "imagery.tif"),
    "wmts": Service(_image("wmts:{address}/wmts/caps.xml?token={MY_KEY}#ortho"), r"caps\.xml", "imagery.tif"),
    "wmts-tiles": Service(_image("wmts:{address}/wmts/caps.xml?token={MY_KEY}#ortho"), r"/wmts/d0", "imagery.tif"),
    "tms": Service(_image("tms:{address}/tms/tilemapresource.xml?pass={MY_KEY}"), r"tilemapresource", "imagery.tif"),
    "stac": Service(_image("stac:{address}/stac#photos"), r"/stac ", "imagery.tif"),
    "stac-collection": Service(_image("stac:{address}/stac#photos"), r"/stac/collections", "imagery.tif"),
    "stac-search": Service(_image("stac:{address}/stac#photos"), r"/stac/search", "imagery.tif"),
    "stac-images": Service(_image("stac:{address}/stac#photos"), r"/images/.*(red|green|blue)", "imagery.tif"),
    "raster": Service(_image("{address}/images/{name}/photo.tif"), r"/images/.*photo", "imagery.tif"),
}


@dataclass(frozen=True)
class Fault:
    reply: Reply
    usual: bool = False
    half: bool = False
    passes: bool = True
    stays: bool = True


PDF = Reply(b"%PDF-1.7 " + b"of another kind " * 40, headers={"Content-Type": "application/pdf"})
PAGE = Reply(b"<!DOCTYPE html><html><body>Back soon</body></html>", headers={"Content-Type": "text/html"})
FAULTS = {
    "429-for-a-second": Fault(Reply(status=429, headers={"Retry-After": "1"}), stays=False),
    "429-for-a-day": Fault(Reply(status=429, headers={"Retry-After": "86400"}), passes=False),
    "429": Fault(Reply(status=429)),
    "504": Fault(Reply(b"<html>gateway</html>", status=504)),
    "406": Fault(Reply(status=406)),
    "reset": Fault(Reply(reset=True)),
    "reset-half-way": Fault(Reply(reset=True, cut=1), usual=True),
    "broken-off": Fault(Reply(cut=1), usual=True),
    "half": Fault(Reply(), usual=True, half=True),
    "another-type": Fault(Reply(headers={"Content-Type": "application/pdf"}), usual=True, stays=False),
    "another-body": Fault(PDF),
    "page": Fault(PAGE),
    "redirect": Fault(Reply(status=302, headers={"Location": "{again}"}), stays=False),
    "circle": Fault(Reply(status=302, headers={"Location": "{again}"}), passes=False),
    "drip": Fault(Reply(drip=0.01), usual=True),
    "endless": Fault(Reply(endless=True), usual=True),
}
WITHOUT_BODY = {"429-for-a-second", "429-for-a-day", "429", "504", "406", "reset", "redirect", "circle"}
# One service of each way of asking meets every fault in the default run; the others, which share its code, a few.
THOROUGH = {"nominatim", "overpass", "extract", "xyz", "stac-images", "raster"}
FEW = {"reset-half-way", "page", "redirect"}
SLOW = {("stac-images", "drip"), ("raster", "drip")}  # GDAL counts its timeouts in seconds


def pairs(*, stays: bool) -> list[Any]:
    """Return the pairs of service and fault, the more in the slow run."""
    return [
        pytest.param(s, f, marks=() if (s in THOROUGH or f in FEW) and (s, f) not in SLOW else pytest.mark.slow)
        for s in SERVICES
        for f, fault in FAULTS.items()
        if (fault.stays if stays else fault.passes) and (s != "extract-size" or f in WITHOUT_BODY)
    ]


@pytest.fixture(scope="module")
def services() -> Iterator[All]:
    with serving_all() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No long waits: those of documents and extracts are noted, those of tiles and of GDAL's are short."""
    seconds: list[float] = []
    usual = Client.__init__

    def patient(self: Client, *args: object, **values: object) -> None:
        usual(self, *args, **{"sleep": seconds.append, **values})  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "__init__", patient)
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)
    for options in (stac._GDAL, GDAL_NETWORK):
        monkeypatch.setitem(options, "GDAL_HTTP_RETRY_DELAY", "0.01")
        monkeypatch.setitem(options, "GDAL_HTTP_LOW_SPEED_TIME", "1")
        monkeypatch.setitem(options, "GDAL_HTTP_TIMEOUT", "2")
    monkeypatch.setattr(client, "_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(overpass, "_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(tile_client, "_TILE_BYTES", 1 << 20)
    monkeypatch.setattr(client, "SLOW_S", 0.1)
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tile_client, "_TILE_S", 0.1)
    return seconds


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, own_surroundings: None) -> None:
    monkeypatch.setenv("MY_KEY", KEY)


class Run:
    """Runs of ``rsosm fetch`` of one city with one service."""

    def __init__(self, services: All, service: str, name: str, folder: Path) -> None:
        self.services, self.service, self.name, self.folder = services, SERVICES[service], name, folder
        self.address = services.address()
        self.city = folder / "root/cities/testdorf"

    def fetch(self) -> tuple[int, str, str]:
        self.folder.mkdir(exist_ok=True)
        town = self.folder / "town.osm"
        town.write_bytes(TOWN)
        places = {"{address}": self.address, "{town}": str(town), "{name}": self.name}
        options = list(self.service.options)
        for place, value in places.items():
            options = [option.replace(place, value) for option in options]
        urls = {"overpass_url": "/api", "nominatim_url": "/nominatim/", "extracts_url": "/index-v1.json"}
        signed = self.address.replace("://", f"://me:{KEY}@")
        settings = [f"{key}={signed}{path}" for key, path in urls.items()] + [f"max_wait_s={MAX_WAIT_S}"]
        options += [part for setting in settings for part in ("--set", setting)]
        return call("--root", str(self.folder / "root"), "fetch", "--city", "Testdorf", *options)

    def files(self) -> dict[str, bytes]:
        return {name: (self.city / name).read_bytes() for name in FILES if (self.city / name).exists()}

    def check_leftovers(self, out: str, err: str) -> None:
        """No secret anywhere, and no half or temporary file but the part of an extract, which is resumed."""
        assert KEY not in out + err
        assert "Traceback" not in err
        for path in self.folder.rglob("*"):
            assert KEY not in str(path)
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
        names = [path.name for path in self.folder.rglob("*")]
        assert not [n for n in names if n.endswith((".part", ".plain.tif")) and n != "land.osm.pbf.part"]
        assert not [n for n in names if n.startswith(".osm-")]


@pytest.fixture(scope="module")
def undisturbed(services: All, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {}


def same(run: Run, clean: Run) -> bool:
    """Whether two runs made the same; of imagery by its pixels, as VRTs name their files."""
    one, other = run.files(), clean.files()
    for files, each in ((one, run), (other, clean)):
        if "imagery.tif" in files:
            with rasterio.open(each.city / "imagery.tif") as image:
                files["imagery.tif"] = np.ascontiguousarray(image.read()).tobytes()
    return one == other


def cleaned(services: All, service: str, undisturbed: dict[str, Run], factory: pytest.TempPathFactory) -> Run:
    """Return the undisturbed run of a service."""
    if service not in undisturbed:
        run = Run(services, service, "clean", factory.mktemp(service) / "clean")
        before = os.environ["RSOSM_CACHE"]
        os.environ["RSOSM_CACHE"] = str(run.folder / "cache")
        services.begin(run.name, None)
        status, out, err = run.fetch()
        os.environ["RSOSM_CACHE"] = before
        assert status == 0, err
        run.check_leftovers(out, err)
        undisturbed[service] = run
    return undisturbed[service]


@pytest.mark.parametrize(("service", "fault"), pairs(stays=False))
def test_trouble_that_passes_ends_in_success(
    services: All, service: str, fault: str, tmp_path: Path, waits: list[float], undisturbed: dict[str, Run],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    clean = cleaned(services, service, undisturbed, tmp_path_factory)
    run, kind = Run(services, service, f"r{next(NUMBERS)}", tmp_path), FAULTS[fault]
    services.begin(run.name, Upset(run.service.pattern, kind.reply, 1, kind.usual, kind.half))
    status, out, err = run.fetch()
    assert status == 0, err
    assert services.met() >= 1, err
    assert same(run, clean)
    run.check_leftovers(out, err)
    assert sum(waits) <= MAX_WAIT_S


@pytest.mark.parametrize(("service", "fault"), pairs(stays=True))
def test_trouble_that_stays_ends_in_one_sentence(
    services: All, service: str, fault: str, tmp_path: Path, waits: list[float], undisturbed: dict[str, Run],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    run, kind = Run(services, service, f"r{next(NUMBERS)}", tmp_path), FAULTS[fault]
    services.begin(run.name, Upset(run.service.pattern, kind.reply, 10**6, kind.usual, kind.half))
    status, out, err = run.fetch()
    assert status in (1, 2), err
    said = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1
    assert "127.0.0.1" in said[0]  # who, and what to do next
    assert re.search(r"Try again later|Run the command again|Check the address|Open the address", said[0])
    assert err.splitlines()[-1] == said[0]
    run.check_leftovers(out, err)
    assert run.service.file not in run.files()
    assert sum(waits) <= MAX_WAIT_S
    assert services.met() <= 64
