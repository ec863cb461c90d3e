"""What ``kill -9`` leaves of a fetch, and that the next one leaves nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fetch_inputs import BBOX, write_photo, write_town
from tile_services import ZOOM, Service, serving_tiles, tile

from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.settings import FetchSettings

pytestmark = pytest.mark.usefixtures("own_surroundings")

SCRIPT = """
import fnmatch, os, signal, sys
from pathlib import Path
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.settings import FetchSettings
root, town, source, nodata, zoom, last, *box = sys.argv[1:]
usual = os.replace
def replace(part, target):
    if fnmatch.fnmatch(os.path.basename(target), last):
        os.kill(os.getpid(), signal.SIGKILL)
    usual(part, target)
os.replace = replace
settings = FetchSettings(xyz_zoom=int(zoom), nodata=int(nodata), xyz_rate=5000)
fetch("Town", root=Path(root), osm=[town], bbox=tuple(map(float, box)), imagery=[source], settings=settings)
"""


@pytest.fixture
def service() -> Iterator[Service]:
    with serving_tiles() as server:
        server.answer = lambda z, x, y, n: tile(x, y)
        yield server


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        *(
            ("raster", last)
            for last in (".place.geojson.found", "place.geojson", "osm.parquet", "*.mask.tif", "*.vrt", "info.json")
        ),
        *(("raster", last) for last in ("imagery.tif", "config.fetch.yaml", "manifest.json")),
        *(("service", last) for last in ("[0-9]*", "imagery.tif", "info.json")),
    ],
)
def test_the_next_fetch_leaves_nothing_of_one_that_was_killed(
    tmp_path: Path, service: Service, kind: str, last: str
) -> None:
    town = write_town(tmp_path / "town.osm")
    source = service.template if kind == "service" else str(write_photo(tmp_path / "photo.tif"))
    zoom = ZOOM - 4  # the town is wider than the place of the tiles
    arguments = [str(tmp_path / "killed"), str(town), source, "255", str(zoom), last, *map(str, BBOX)]
    process = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], cwd=Path(__file__).resolve().parents[1])
    assert process.returncode == -signal.SIGKILL
    city = tmp_path / "killed/cities/town"
    assert list(city.rglob(".*.part" if last != "place.geojson" else ".place.geojson.found"))
    plain = [path for path in city.iterdir() if path.name.endswith(".plain.tif")]
    assert len(plain) == (kind == "service" and last == "imagery.tif")
    (city / f".imagery.tif.{os.getpid()}.part.ovr.tmp").touch()  # GDAL's own, while it copies
    others = [city / ".tiles.h5.1.part", city / ".notes"]  # of another command, which may run now; of the user
    for path in others:
        path.touch()
    settings = FetchSettings(xyz_zoom=zoom, nodata=255, xyz_rate=5000)
    for root in ("killed", "clean"):
        fetch("Town", root=tmp_path / root, osm=[town], bbox=BBOX, imagery=[source], settings=settings)
    assert all(path.exists() for path in others)
    for path in others:
        path.unlink()
    assert names(city) == names(tmp_path / "clean/cities/town")
