"""Addresses of tile services: what is filled in, what is asked of the environment, which are one service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tile_services import Answer, Service, fetch, serving_tiles, tile

from rsosm_cli.errors import UsageError
from rsosm_cli.imagery.service import quadkey, tile_service


@pytest.fixture
def service() -> Iterator[Service]:
    with serving_tiles() as server:
        yield server


def test_addresses_of_tiles() -> None:
    assert quadkey(3, 3, 5) == "213"
    tms = tile_service("https://{s}.example.org/{z}/{x}/{-y}{r}.jpg?key={MY_KEY}", {"MY_KEY": "s3cret"})
    assert tms is not None
    assert tms.url(3, 3, 5) == "https://c.example.org/3/3/2@2x.jpg?key=s3cret"
    assert "s3cret" not in repr(tms) + tms.shown + tms.licence + tms.attribution
    bing = tile_service("https://t.example.org/a{q}.jpeg", {})
    assert bing is not None
    assert bing.url(3, 3, 5) == "https://t.example.org/a213.jpeg"
    named = tile_service("Esri.WorldImagery", {})
    assert named is not None
    assert "World_Imagery/MapServer/tile/17/5/4" in named.url(17, 4, 5)
    assert "Esri" in named.attribution
    mapbox = tile_service("MapTiler.Satellite", {"RSOSM_KEY": "s3cret"})
    assert mapbox is not None
    assert mapbox.url(1, 0, 0).endswith("key=s3cret")
    assert "s3cret" not in repr(mapbox)
    assert tile_service("some/raster.tif", {}) is None
    assert tile_service("no-such-service", {}) is None


def test_a_key_that_is_not_in_the_environment_is_asked_for() -> None:
    with pytest.raises(UsageError, match="neither key nor RSOSM_KEY"):
        tile_service("MapTiler.Satellite", {})
    with pytest.raises(UsageError, match="is no address"):
        tile_service("https://[host/{z}/{x}/{y}", {})
    for template, lacking in (("{x}/{y}", "z"), ("{z}/{x}.png", "y"), ("{z}/{y}.png", "x")):
        with pytest.raises(UsageError, match=rf"has no \{{{lacking}\}}"):
            tile_service(f"https://example.org/{template}", {})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/{z}/{x}/{y}/5ac626e091b5310010e0d482.png", "/{z}/{x}/{y}/59e62b9a3d6412ef72209d69.png"),
        (
            "/{z}/{x}/{y}?mosaic=planet_medres_visual_2019-12_2020-05_mosaic",
            "/{z}/{x}/{y}?mosaic=planet_medres_visual_2022-06_2022-11_mosaic",
        ),
        ("/{z}/{x}/{y}?5f0c1e7ad2b94c6f8a3e1d0b7c5f9e21", "/{z}/{x}/{y}?6f0c1e7ad2b94c6f8a3e1d0b7c5f9e21"),
    ],
    ids=["ids in the path", "mosaics", "bare"],
)
def test_addresses_that_differ_in_a_long_name_are_two_services(
    service: Service, tmp_path: Path, one: str, other: str
) -> None:
    def answer(z: int, x: int, y: int, n: int) -> Answer:
        first = service.paths[-1].endswith(one.rpartition("{y}")[2])
        return tile(x, y) if first else tile(x + 1, y)

    service.answer = answer
    address = f"http://127.0.0.1:{service.server_port}"
    made = [fetch(tmp_path, address + path, xyz_workers=1).path.read_bytes() for path in (one, other)]
    assert made[0] != made[1]
    asked = sum(service.asked.values())
    fetch(tmp_path, address + one, xyz_workers=1)
    assert sum(service.asked.values()) == asked


def test_another_key_is_the_same_service(service: Service, tmp_path: Path) -> None:
    keyed = f"http://me:pw@127.0.0.1:{service.server_port}/{{z}}/{{x}}/{{y}}.png?api_key="
    fetch(tmp_path, keyed + "5f0c1e7ad2b94c6f")
    service.asked.clear()
    fetch(tmp_path, keyed.replace("me:pw", "me:other") + "6f0c1e7ad2b94c6f")
    assert not service.asked
