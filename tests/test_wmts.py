"""Tile services that describe themselves: WMTS and TMS."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from tile_services import (
    PLACE,
    TILE_PX,
    Service,
    capabilities,
    fetch,
    kill_in_the_middle,
    pixels_of,
    serving_tiles,
    tile,
    tile_map,
)

from rsosm_cli import client
from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.geometry import Projection
from rsosm_cli.imagery import tile_client
from rsosm_cli.imagery.described import find_service
from rsosm_cli.imagery.reader import ImageReader
from rsosm_cli.imagery.tile_grid import METRES_PER_DEGREE
from rsosm_cli.settings import FetchSettings


@pytest.fixture
def service() -> Iterator[Service]:
    with serving_tiles() as server:
        yield server


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSOSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.001)


@pytest.mark.parametrize("rest", [True, False])
def test_a_wmts_gives_the_same_image_as_xyz(
    service: Service, tmp_path: Path, rest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    plain = fetch(tmp_path / "xyz", service.template).path.read_bytes()
    address = f"http://127.0.0.1:{service.server_port}"
    service.documents["/wmts/caps.xml"] = capabilities(address, rest=rest)
    service.asked.clear()
    if rest:  # numbers in the address are the tile's alone
        service.documents["/wmts/caps.xml"] = service.documents["/wmts/caps.xml"].replace(b"d0", b"day")
    info = fetch(tmp_path / "wmts", f"wmts:{address}/wmts/caps.xml?token={{MY_KEY}}#ortho")
    with rasterio.open(info.path) as one, rasterio.open(tmp_path / "xyz" / "imagery.tif") as other:
        np.testing.assert_array_equal(one.read(), other.read())
    assert plain
    if not rest:
        assert "token=s3cret" in service.paths[-1]
    credit = info.sources[0]
    assert (credit["name"], credit["attribution"]) == ("Air photos, ortho", "Land survey, CC-BY-4.0")
    assert "s3cret" not in str(info) + (tmp_path / "wmts/imagery/info.json").read_text()


def test_layers_that_differ_in_the_year_are_two_services(service: Service, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{service.server_port}"
    service.answer = lambda z, x, y, n: tile(x, y) if "2018" in service.paths[-1] else tile(x + 1, y)
    made = []
    for layer in ("ORTHOIMAGERY.ORTHOPHOTOS2018", "ORTHOIMAGERY.ORTHOPHOTOS2019"):
        described = capabilities(address, rest=False).replace(b">ortho<", f">{layer}<".encode())
        service.documents[f"/{layer}.xml"] = described
        source = f"wmts:{address}/{layer}.xml#{layer}"
        made.append(fetch(tmp_path, source, xyz_workers=1).path.read_bytes())
    assert made[0] != made[1]


def test_a_key_that_the_description_repeats_is_shown_nowhere(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "tell/nobody")
    address = f"http://127.0.0.1:{service.server_port}"
    described = capabilities(address, rest=True).replace(b"d0", b"day").decode()
    service.documents["/caps.xml"] = described.replace("/wmts/", "/wmts/tell%2Fnobody/").encode()
    source = f"wmts:{address}/caps.xml?mine={{MY_KEY}}#ortho"
    found = find_service(source, FetchSettings())
    assert found is not None
    assert found.shown.startswith(f"{address}/wmts/{{MY_KEY}}/day/")
    identity = found.identity
    monkeypatch.setenv("MY_KEY", "told")
    service.documents["/caps.xml"] = described.replace("/wmts/", "/wmts/told/").encode()
    found = find_service(source, FetchSettings())
    assert found is not None
    assert found.identity == identity
    service.documents.clear()
    monkeypatch.setattr(client, "_TRIES", 1)
    monkeypatch.setenv("MY_KEY", "tell-nobody")
    service.answer = lambda z, x, y, n: (404, {}, b"")
    with pytest.raises(SourceError, match="status 404") as caught:
        find_service(f"wmts:{address}/{{MY_KEY}}/1/2/3.xml#ortho", FetchSettings())
    assert "tell-nobody" not in f"{caught.value}{caught.value.data}"


def test_a_wmts_that_cannot_be_used(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{service.server_port}"
    service.documents["/a.xml"] = capabilities(address, rest=True)
    service.documents["/b.xml"] = capabilities(address, rest=True, crs="EPSG:999999")
    service.documents["/c.xml"] = b"<html><body>Wartung</body></html>"
    service.documents["/d.xml"] = b"<ServiceExceptionReport>Token wrong</ServiceExceptionReport>"
    with pytest.raises(UsageError, match=r"No layer of .* is named.*#ortho"):
        fetch(tmp_path, f"wmts:{address}/a.xml")
    with pytest.raises(UsageError, match="has no layer 'orto'"):
        fetch(tmp_path, f"wmts:{address}/a.xml#orto")
    with pytest.raises(UsageError, match=r"no tiling that can be used.*utm \(EPSG:32645\), web \(EPSG:999999\)"):
        fetch(tmp_path, f"wmts:{address}/b.xml#ortho")
    monkeypatch.setattr(client, "_TRIES", 1)
    with pytest.raises(SourceError, match="its description is a html"):
        fetch(tmp_path, f"wmts:{address}/c.xml#ortho")
    with pytest.raises(SourceError, match="ServiceExceptionReport: Token wrong"):
        fetch(tmp_path, f"wmts:{address}/d.xml#ortho")


UTM_CORNER, DEGREES_CORNER = (300_000.0, 3_100_000.0), (80.0, 30.0)  # west, north


@pytest.mark.parametrize(
    ("supported", "crs", "corner", "text", "metres"),
    [
        ("urn:ogc:def:crs:EPSG::32645", "EPSG:32645", UTM_CORNER, "300000 3100000", 1.0),
        ("EPSG:32645", "EPSG:32645", UTM_CORNER, "3100000 300000", 1.0),  # some servers turn them round
        ("urn:ogc:def:crs:EPSG::4326", "EPSG:4326", DEGREES_CORNER, "30 80", METRES_PER_DEGREE),
        ("urn:ogc:def:crs:OGC:1.3:CRS84", "OGC:CRS84", DEGREES_CORNER, "80 30", METRES_PER_DEGREE),
    ],
)
def test_a_wmts_in_another_crs(
    service: Service, tmp_path: Path, supported: str, crs: str, corner: tuple[float, float], text: str, metres: float
) -> None:
    """Every tile lies where the description puts it, in a CRS of its own, and the finest zoom that the GSD asks for."""
    pixels_m = (9.6, 2.4, 0.6, 0.15)
    matrices = "".join(
        f"<TileMatrix><ows:Identifier>{10 + i}</ows:Identifier><ScaleDenominator>{m / 0.00028!r}</ScaleDenominator>"
        f"<TopLeftCorner>{text}</TopLeftCorner><TileWidth>{TILE_PX}</TileWidth><TileHeight>{TILE_PX}</TileHeight>"
        "<MatrixWidth>90000</MatrixWidth><MatrixHeight>30000</MatrixHeight></TileMatrix>"
        for i, m in enumerate(pixels_m)
    )
    address = f"http://127.0.0.1:{service.server_port}"
    whole = capabilities(address, rest=True, crs=supported).decode()
    start = whole.index("<TileMatrix><ows:Identifier>day:16")
    stop = whole.index("</TileMatrixSet>", start)
    whole = whole[:start] + matrices + whole[stop:]
    service.documents["/a.xml"] = whole.replace("{Time}/{Style}/{TileMatrixSet}/", "").encode()
    info = fetch(tmp_path, f"wmts:{address}/a.xml#ortho", xyz_zoom=None, gsd_m=0.6)
    assert {z for z, _, _ in service.asked} == {12}
    assert (info.crs, info.missing) == (crs, [])
    side = 0.6 * TILE_PX / metres
    with rasterio.open(info.path) as image:
        assert image.crs.to_string() == crs.replace("OGC:CRS84", "EPSG:4326")  # in a GeoTIFF these are one
        for _, x, y in service.asked:
            window = image.window(
                corner[0] + x * side, corner[1] - (y + 1) * side, corner[0] + (x + 1) * side, corner[1] - y * side
            ).round_offsets(pixel_precision=0)
            row, col = round(window.row_off), round(window.col_off)
            read = image.read((1, 2, 3), window=((row, row + TILE_PX), (col, col + TILE_PX)))
            np.testing.assert_array_equal(read.transpose(1, 2, 0), pixels_of(x, y))
        box = rasterio.warp.transform_bounds("EPSG:4326", image.crs, *PLACE.bounds)
        assert image.bounds.left < box[0] < box[2] < image.bounds.right
        assert image.bounds.bottom < box[1] < box[3] < image.bounds.top
    with ImageReader(info.path) as reader:  # and it is read in the grid of the city as any image
        projection = Projection("EPSG:32645", 0.6)
        west, south, east, north = rasterio.warp.transform_bounds("EPSG:4326", "EPSG:32645", *PLACE.bounds)
        pixels, valid = reader.read(projection, projection.pixels_around(west, south, east, north))
    assert valid.all()
    assert pixels.std() > 10


TMS = b"""<TileMap><SRS>EPSG:3857</SRS><TileFormat width="256" extension="png"/>
<TileSets><TileSet href="17" units-per-pixel="1"/></TileSets></TileMap>"""


@pytest.mark.parametrize(
    ("kind", "old", "new", "said"),
    [
        ("wmts", "<ScaleDenominator>", "<ScaleDenominator>-", "the ScaleDenominator '-"),
        ("wmts", f"<TileWidth>{TILE_PX}", "<TileWidth>0", "the TileWidth '0'"),
        ("wmts", f"<TileHeight>{TILE_PX}", "<TileHeight>much", "the TileHeight 'much'"),
        ("wmts", "<TopLeftCorner>", "<TopLeftCorner>1 ", "the TopLeftCorner '1 -20"),
        ("wmts", "{Style}", "{Elevation}", "the place {Elevation} and no value"),
        ("wmts", "<Default>d0</Default>", "", "the place {Time} and no value"),
        ("wmts", "{TileCol}", "5", "without column, row and zoom"),
        ("tms", 'width="256"', 'width="0"', "the width '0'"),
        ("tms", 'width="256"', 'width="wide"', "the width 'wide'"),
        ("tms", 'pixel="1"', 'pixel="0"', "the units-per-pixel '0'"),
        ("tms", 'pixel="1"', 'pixel="nan"', "the units-per-pixel 'nan'"),
        ("tms", 'pixel="1"', 'pixel="1e-320"', "the units-per-pixel '1e-320'"),
    ],
)
def test_a_description_of_wrong_numbers_and_places(
    service: Service, tmp_path: Path, kind: str, old: str, new: str, said: str
) -> None:
    address = f"http://127.0.0.1:{service.server_port}"
    whole = capabilities(address, rest=True) if kind == "wmts" else TMS
    assert old.encode() in whole
    service.documents["/a.xml"] = whole.replace(old.encode(), new.encode())
    with pytest.raises(SourceError, match=re.escape(said)):
        fetch(tmp_path, f"{kind}:{address}/a.xml" + ("#ortho" if kind == "wmts" else ""))


def test_a_tms_counts_its_rows_from_the_south(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(tmp_path / "xyz", service.template)
    service.answer = lambda z, x, y, n: tile(x, (1 << z) - 1 - y)
    address = f"http://127.0.0.1:{service.server_port}"
    service.documents["/tms/tilemapresource.xml"] = tile_map()
    with rasterio.open(tmp_path / "xyz" / "imagery.tif") as other:
        expected = other.read()
    for number, source in enumerate(
        [f"tms:{service.template}", service.template.replace("{y}", "{-y}"), f"tms:{address}/tms/tilemapresource.xml"]
    ):
        with rasterio.open(fetch(tmp_path / str(number), source).path) as one:
            np.testing.assert_array_equal(one.read(), expected)


@pytest.mark.parametrize("rest", [True, False])
def test_after_kill_9_a_second_run_completes_byte_for_byte(service: Service, tmp_path: Path, rest: bool) -> None:
    address = f"http://127.0.0.1:{service.server_port}"
    service.documents["/a.xml"] = capabilities(address, rest=rest).replace(b"d0", b"day")
    source = f"wmts:{address}/a.xml#ortho"
    clean = fetch(tmp_path / "clean", source).path.read_bytes()
    service.asked.clear()
    kept = kill_in_the_middle(service, source, tmp_path / "killed")
    assert 2 <= len(kept) <= 5
    assert not (tmp_path / "killed" / "imagery.tif").exists()
    described = service.described
    assert fetch(tmp_path / "killed", source).path.read_bytes() == clean
    assert kept.isdisjoint(service.asked)
    assert service.described == described  # the description is kept, too


def test_a_description_that_drips_ends(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ANSWER_S", 0.1 - client._TIMEOUT_S[1])
    monkeypatch.setattr(client, "_TRIES", 2)
    address = f"http://127.0.0.1:{service.server_port}"
    service.documents["/a.xml"] = capabilities(address, rest=True).replace(b"d0", b"day")
    service.drip_s = 0.01
    with pytest.raises(SourceError, match=r"The WMTS service at .*the answer was not whole in time, after 2 tries"):
        fetch(tmp_path, f"wmts:{address}/a.xml#ortho")
    service.drip_s = 0.0
    monkeypatch.setattr(client, "_ANSWER_S", 60.0)
    assert fetch(tmp_path, f"wmts:{address}/a.xml#ortho").count
