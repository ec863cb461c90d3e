"""What a user names as imagery: files, folders, addresses; what bad ones are answered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from rasters import NORTH, UTM, WEST, noise, place_at, prepare, window, write

from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.geometry import Projection
from rsosm_cli.imagery.prepare import ImageryInfo, prepare_imagery
from rsosm_cli.imagery.reader import ImageReader
from rsosm_cli.imagery.sources import raster_paths, stamps
from rsosm_cli.imagery.whole import check_whole
from rsosm_cli.settings import FetchSettings


def test_licence_comes_from_the_tags_and_is_never_assumed(tmp_path: Path) -> None:
    tags = {"TIFFTAG_COPYRIGHT": "CC-BY-4.0", "TIFFTAG_ARTIST": "OpenAerialMap"}
    info = prepare(
        tmp_path,
        write(tmp_path / "a.tif", noise((3, 64, 64)), tags=tags),
        write(tmp_path / "b.tif", noise((3, 64, 64))),
    )
    assert info.sources == [
        {"name": "a.tif", "licence": "CC-BY-4.0", "attribution": "OpenAerialMap"},
        {"name": "b.tif", "licence": "unknown: supplied by the user", "attribution": ""},
    ]


def test_folders_and_patterns_of_rasters(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    names = [write(photos / f"{i}.tif", noise((3, 64, 64)), west=WEST + 64 * i) for i in range(3)]
    assert raster_paths(str(photos)) == [str(n) for n in names]
    assert raster_paths(str(photos / "[01].tif")) == [str(n) for n in names[:2]]
    far = write(photos / "far.tif", noise((3, 64, 64)), west=WEST + 90_000)
    info = prepare(tmp_path, photos)
    assert info.count == 3
    assert any("1 of 4 rasters" in note for note in info.notes)
    assert str(far) not in info.path.read_text()


def test_a_jpeg_called_tif_opens(tmp_path: Path) -> None:
    path = tmp_path / "photo.tif"
    with rasterio.open(write(tmp_path / "a.tif", np.full((3, 64, 64), 77, np.uint8))) as source:
        rasterio.shutil.copy(source, path, driver="JPEG", WORLDFILE="NO")
    with ImageReader(path) as reader:
        image, valid = reader.read(Projection(UTM, 1.0), window())
    assert path.read_bytes()[:2] == b"\xff\xd8"
    assert valid.all()
    assert np.abs(image.astype(int) - 77).max() <= 2


# In a process of its own: GDAL holds Python's lock while it waits. Gives parts of a file, as web servers do.
_WEB_SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
body = open(sys.argv[1], "rb").read()
class Ranges(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
    def do_GET(self):
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else len(body)]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
server = HTTPServer(("127.0.0.1", 0), Ranges)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.timeout(60)
def test_a_raster_behind_an_address_is_read_where_it_is(tmp_path: Path) -> None:
    pixels = noise((3, 64, 64))
    command = [sys.executable, "-c", _WEB_SERVER, str(write(tmp_path / "a.tif", pixels))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            info = prepare(tmp_path, f"http://127.0.0.1:{int(server.stdout.readline())}/a.tif")
            with ImageReader(info.path) as reader:
                image, valid = reader.read(Projection(UTM, 1.0), window())
        finally:
            server.terminate()
    assert valid.all()
    np.testing.assert_array_equal(image, pixels)


def test_addresses_that_hold_a_key_or_are_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a key") as caught:
        prepare(tmp_path, "https://example.org/a.tif?token=tell-nobody")
    assert "tell-nobody" not in str(caught.value)
    with pytest.raises(UsageError, match="ftp is not one of"):
        prepare(tmp_path, "ftp://example.org/a.tif")


def test_stamps_change_with_the_files_and_hold_no_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 64, 64)))
    before = stamps(str(tmp_path))
    assert stamps(str(tmp_path)) == before
    write(path, noise((3, 64, 65)))
    assert stamps(str(tmp_path)) != before
    assert stamps("https://h/{z}/{x}/{y}?key=tell-nobody") == ["https://h/{z}/{x}/{y}?key=***"]
    assert stamps("Esri.WorldImagery") == ["Esri.WorldImagery"]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning")
def test_bad_rasters_are_answered_in_a_sentence(tmp_path: Path) -> None:
    good = write(tmp_path / "good.tif", noise((1, 64, 64)))
    nowhere = write(tmp_path / "nowhere.tif", noise((3, 64, 64)), crs=None)
    text = tmp_path / "text.tif"
    text.write_text("not an image")
    with pytest.raises(SourceError, match=r"nowhere\.tif has no coordinate reference system"):
        prepare(tmp_path, nowhere)
    with pytest.raises(SourceError, match="does not meet the place"):
        prepare(tmp_path, good, place=shapely.box(8.5, 47.3, 8.6, 47.4))
    with pytest.raises(UsageError, match="has 1 band, and band 2 is asked for"):
        ImageReader(good)
    with pytest.raises(SourceError, match="not a raster that GDAL can read"):
        ImageReader(text, (1,))
    with pytest.raises(MissingError, match="There is no raster"):
        prepare(tmp_path, tmp_path / "none.tif")
    with pytest.raises(MissingError, match="There is no raster"):
        ImageReader(tmp_path / "none.tif")
    moved = prepare(tmp_path, good)
    good.unlink()
    with ImageReader(moved.path, (1,)) as reader, pytest.raises(SourceError, match="cannot be read"):
        reader.read(Projection(UTM, 1.0), window())


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 64, 64)))
    folder = tmp_path / "city"
    info = prepare_imagery(
        [str(path)], place_at(), folder, folder / "imagery.tif", gsd_m=None, settings=FetchSettings(), dry_run=True
    )
    assert isinstance(info, ImageryInfo)
    assert (info.kind, info.count) == ("vrt", 1)
    assert not folder.exists()


class TestWholeness:
    """A copy or download that broke off opens as if nothing had happened: its header stands in front."""

    @pytest.fixture(params=["strips", "tiles", "cog", "big", "overviews beside"])
    def raster(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / "a.tif"
        extra: dict[str, dict[str, object]] = {
            "strips": {"interleave": "band"},
            "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
            "cog": {"driver": "COG", "compress": "deflate", "blocksize": 128},
            "big": {"tiled": True, "blockxsize": 64, "blockysize": 64, "BIGTIFF": "YES", "ENDIANNESS": "BIG"},
            "overviews beside": {"tiled": True, "blockxsize": 64, "blockysize": 64},
        }
        write(path, noise((3, 320, 320)), **extra[request.param])
        if request.param == "overviews beside":
            with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as image:
                image.build_overviews([2, 4])
        return path

    def test_a_whole_one_is_believed(self, raster: Path) -> None:
        check_whole(str(raster))

    @pytest.mark.parametrize("left", [0.5, 0.99])
    def test_one_that_is_cut_off_is_a_sentence(self, raster: Path, left: float, tmp_path: Path) -> None:
        for path in (raster, raster.with_name("a.tif.ovr")):
            if path.exists():
                whole = path.read_bytes()
                path.write_bytes(whole[: int(len(whole) * left)])
                with pytest.raises(SourceError, match=r"a\.tif is (cut off|damaged|not a raster that GDAL can read)"):
                    prepare(tmp_path, raster)
                path.write_bytes(whole)
        assert not (tmp_path / "city" / "imagery.tif").exists()

    def test_an_end_of_zeros_is_damage(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tif", noise((3, 256, 256)), driver="COG", blocksize=128, compress="deflate")
        whole = path.read_bytes()
        path.write_bytes(whole[:-60_000] + bytes(60_000))
        with pytest.raises(SourceError, match=r"a\.tif is damaged: its last pixels cannot be read"):
            check_whole(str(path))

    def test_blocks_without_bytes_are_empty_ground(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        profile = {"width": 256, "height": 256, "count": 1, "dtype": "uint8", "crs": UTM, "tiled": True}
        with rasterio.open(
            path, "w", driver="GTiff", sparse_ok=True, blockxsize=64, blockysize=64, nodata=0,
            transform=rasterio.Affine(1, 0, WEST, 0, -1, NORTH), **profile,
        ) as image:  # fmt: skip
            image.write(noise((1, 64, 64)), window=rasterio.windows.Window(0, 0, 64, 64))
        check_whole(str(path))
