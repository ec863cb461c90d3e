"""``fetch`` from tile services: what makes it fetch again, what does not, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from map_services import osm_xml
from tile_services import PLACE, TILE_PX, ZOOM, Answer, Service, pixels_of, png, serving_tiles, tile

from rsosm_cli.imagery import tile_client
from rsosm_cli.pipeline.fetch import fetch
from rsosm_cli.pipeline.result import Result
from rsosm_cli.settings import FetchSettings

pytestmark = pytest.mark.usefixtures("own_surroundings")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)
    with serving_tiles() as server:
        yield server


def run(folder: Path, source: str, **values: object) -> Result:
    town = folder / "town.osm"
    if not town.exists():
        town.write_bytes(osm_xml(west=85.519, south=27.629))
    settings = FetchSettings(**{"xyz_zoom": ZOOM, "xyz_rate": 5000.0, "max_wait_s": 5.0} | values)
    return fetch("Town", root=folder, osm=[town], bbox=PLACE.bounds, imagery=[source], settings=settings)


def alpha(result: Result) -> np.ndarray:
    with rasterio.open(result.paths["imagery"]) as image:
        return image.read(4)


def test_the_hint_to_keep_placeholders_makes_the_image_again(service: Service, tmp_path: Path) -> None:
    sorry = png(np.full((TILE_PX, TILE_PX, 3), 200, np.uint8))
    service.answer = lambda z, x, y, n: (200, {}, sorry) if (x + y) % 2 else tile(x, y)
    first = run(tmp_path, service.template)
    assert not alpha(first).all()
    assert any("--set xyz_placeholders=false keeps them" in note for note in first.notes)
    kept = run(tmp_path, service.template, xyz_placeholders=False)
    assert (kept.status, alpha(kept).all()) == ("done", True)
    assert run(tmp_path, service.template, xyz_placeholders=False).status == "skipped"
    assert run(tmp_path, service.template).status == "done"


def test_another_mosaic_is_another_image_and_the_record_names_it(service: Service, tmp_path: Path) -> None:
    def answer(z: int, x: int, y: int, n: int) -> Answer:
        return 200, {}, png(pixels_of(x, y if "2019-12" in service.paths[-1] else y + 1))

    service.answer = answer
    mosaics = [f"planet_medres_visual_{months}_mosaic" for months in ("2019-12_2020-05", "2022-06_2022-11")]
    made = []
    for mosaic in mosaics:
        result = run(tmp_path, f"{service.template}?mosaic={mosaic}&api_key=tell-nobody", xyz_workers=1)
        made.append(Path(result.paths["imagery"]).read_bytes())
        manifest = (tmp_path / "cities/town/manifest.json").read_text()
        assert f"?mosaic={mosaic}&api_key=***" in json.loads(manifest)["steps"]["fetch:imagery"]["inputs"][0]
        assert "tell-nobody" not in manifest
    assert made[0] != made[1]
    again = run(tmp_path, f"{service.template}?mosaic={mosaics[1]}&api_key=another")
    assert again.status == "skipped"
