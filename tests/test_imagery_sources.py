"""What a user names as imagery: files, folders, addresses; what bad ones are answered."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from command_line import call
from fetch_inputs import BBOX, write_photo, write_town
from raster_server import serving_rasters
from rasters import NORTH, UTM, WEST, noise, place_at, prepare, window, write

from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.geometry import Projection
from rsosm_cli.imagery import raster, whole
from rsosm_cli.imagery.prepare import ImageryInfo, prepare_imagery
from rsosm_cli.imagery.raster import GDAL_NETWORK, open_raster
from rsosm_cli.imagery.reader import ImageReader
from rsosm_cli.imagery.sources import raster_paths
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
    with pytest.raises(MissingError, match=r"No raster matches .*none\*\.tif"):
        raster_paths(str(photos / "none*.tif"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"There is no raster in .*empty\. Looked for \.tif"):
        raster_paths(str(tmp_path / "empty"))
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


@pytest.mark.timeout(60)
def test_rasters_behind_addresses_are_read_where_they_are(tmp_path: Path) -> None:
    pixels = noise((3, 64, 128))
    (tmp_path / "files" / "sheets").mkdir(parents=True)
    for name, part, west in (("a", pixels[:, :, :64], WEST), ("b", pixels[:, :, 64:], WEST + 64)):
        write(tmp_path / "files" / "sheets" / f"{name}.tif", part, west=west)
    with serving_rasters(tmp_path / "files") as host:
        info = prepare(tmp_path, *(f"http://{host}/sheets/{name}.tif" for name in "ab"), place=place_at(width=120))
        with ImageReader(info.path) as reader:
            image, valid = reader.read(Projection(UTM, 1.0), window(128))
        with pytest.raises(SourceError, match=rf"^http://{host}/sheets/c\.tif cannot be read: there is no such file\."):
            prepare(tmp_path, f"http://{host}/sheets/c.tif")
    assert (info.kind, info.count) == ("vrt", 2)
    assert valid[:64].all()
    np.testing.assert_array_equal(image[:, :64], pixels)


@pytest.mark.timeout(60)
def test_a_server_that_stops_giving_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files" / "tired").mkdir(parents=True)
    (tmp_path / "files" / "open").mkdir()
    cog = {"driver": "COG", "blocksize": 128, "compress": "deflate"}
    path = write(tmp_path / "files" / "tired" / "a.tif", noise((3, 512, 512)).astype(np.uint16), **cog)
    with rasterio.open(path) as source:
        block = int(source.get_tag_item("BLOCK_OFFSET_2_0", "TIFF", 1))
    garbled = bytearray(path.read_bytes())
    garbled[block + 2 : block + 1000] = np.random.default_rng(0).bytes(998)
    (tmp_path / "files" / "open" / "a.tif").write_bytes(garbled)
    monkeypatch.setitem(GDAL_NETWORK, "GDAL_HTTP_MAX_RETRY", 0)
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.0)
    with serving_rasters(tmp_path / "files") as host:
        with pytest.raises(SourceError, match=r"/tired/a\.tif cannot be read: its server does not give it"):
            prepare(tmp_path, f"http://{host}/tired/a.tif")
        with pytest.raises(SourceError, match=r"/open/a\.tif is damaged"):
            prepare(tmp_path, f"http://{host}/open/a.tif")


@pytest.mark.timeout(60)
def test_a_server_that_gives_no_parts_of_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "files" / "simple").mkdir(parents=True)
    write(tmp_path / "files" / "simple" / "a.tif", noise((3, 512, 512)), tiled=True)
    said = r"/simple/a\.tif cannot be read: its server gives whole files alone.* Download the raster"
    with serving_rasters(tmp_path / "files") as host, pytest.raises(SourceError, match=said):
        prepare(tmp_path, f"http://{host}/simple/a.tif")


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ("'/vsicurl/https://h/a' does not exist in the file system, and is not recognized as a supported dataset name",
         "there is no such file"),
        ("'/vsicurl/https://h/a' not recognized as being in a supported file format", "it is not a raster"),
        ("HTTP response code: 404", "there is no such file"),
        ("HTTP response code: 503", "its server does not give it \\(503\\)"),
    ],
)  # fmt: skip
def test_what_versions_of_gdal_say_of_an_address(monkeypatch: pytest.MonkeyPatch, detail: str, words: str) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise rasterio.errors.RasterioIOError(detail)

    monkeypatch.setattr(rasterio, "open", refuse)
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.0)
    with pytest.raises(SourceError, match=f"^https://h/a cannot be read: {words}"):
        open_raster("/vsicurl/https://h/a")


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("own_surroundings")
def test_rasters_in_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bucket in ("open", "private", "broken"):
        (tmp_path / "files" / bucket).mkdir(parents=True)
        write_photo(tmp_path / "files" / bucket / "photo.tif")
    (tmp_path / "files" / "open" / "text.tif").write_text("no raster")
    write_photo(tmp_path / "files" / "private" / "signed.tif")  # GDAL remembers what it was refused
    fetch = ["--root", str(tmp_path / "root"), "fetch", "--osm", str(write_town(tmp_path / "town.osm"))]
    fetch += ["--bbox", *map(str, BBOX)]
    monkeypatch.setitem(GDAL_NETWORK, "GDAL_HTTP_MAX_RETRY", 0)
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.01)
    with serving_rasters(tmp_path / "files") as host:
        settings = {"S3_ENDPOINT": host, "HTTPS": "NO", "VIRTUAL_HOSTING": "FALSE", "NO_SIGN_REQUEST": "YES"}
        for name, value in settings.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        for number, source in enumerate(("s3://open/photo.tif", "/vsis3/open/photo.tif")):
            status, _, err = call(*fetch, "--city", f"Town {number}", "--imagery", source)
            assert status == 0, err
            with ImageReader(tmp_path / f"root/cities/town-{number}/imagery.tif") as reader:
                west, south, east, north = reader.bounds_in("EPSG:32632")
                projection = Projection("EPSG:32632", 10.0)
                _, valid = reader.read(projection, projection.pixels_around(west, south, east, north))
            assert valid.mean() > 0.9
        for address, said in (
            ("nobucket/photo.tif", "there is no such bucket. Check the address."),
            ("open/none.tif", "there is no such file. Check the address."),
            ("open/text.tif", "it is not a raster. Check the address in a browser."),
            ("private/photo.tif", "access is refused. Give credentials"),
            ("broken/photo.tif", "its server does not give it"),
        ):
            status, _, err = call(*fetch, "--city", "Other", "--imagery", f"s3://{address}")
            assert status == 1
            assert f"Error: s3://{address} cannot be read: {said}" in err
            said_lines = [line for line in err.strip().splitlines() if "next try" not in line]
            assert len(said_lines) == 1  # before the OSM file is read
        monkeypatch.delenv("AWS_NO_SIGN_REQUEST")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-TELL-NOBODY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tell-nobody")
        said = [call(*fetch, "--city", "Signed", "--imagery", f"s3://private/{n}.tif") for n in ("none", "signed")]
    assert [status for status, _, _ in said] == [1, 0]
    written = [path.read_bytes().lower() for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert not any(b"tell-nobody" in text for text in [*written, str(said).lower().encode()])
    assert not (tmp_path / "root/cities/other/imagery.tif").exists()


def test_addresses_that_hold_a_key_or_are_unknown_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a key") as caught:
        prepare(tmp_path, "https://example.org/a.tif?token=tell-nobody")
    assert "tell-nobody" not in str(caught.value)
    keys = (
        "/vsicurl/https://example.org/a.tif?token=tell-nobody",
        "/vsizip//vsicurl/https://me:tell-nobody@example.org/a.zip/a.tif",
        "/vsicurl?pc_url_signing=no&url=https%3A%2F%2Fexample.org%2Fa.tif%3Ftoken%3Dtell-nobody",
        "/vsicurl?header.Authorization=tell-nobody&url=https%3A%2F%2Fexample.org%2Fa.tif",
        "https://example.org/render?url=https%3A%2F%2Fexample.org%2Fa.tif%3Ftoken%3Dtell-nobody",
        "https://example.org/render?url=https://me:tell-nobody@example.org/a.tif",
    )
    not_supported = (
        "/vsicurl?header.Cookie=tell-nobody&url=https%3A%2F%2Fexample.org%2Fa.tif",
        "/vsicurl?use_head=no",
        "/vsizip/vsicurl?url=tell-nobody",
    )
    refused = [(s, "holds a key") for s in keys]
    refused += [(s, r"is a form of address that is not supported\.") for s in not_supported]
    for source, words in refused:
        with pytest.raises(UsageError, match=words) as caught:
            prepare(tmp_path, source)
        assert "tell-nobody" not in str(caught.value)
    for source in (
        "https://example.org/render?url=https://example.com/a.tif",
        "/vsicurl/https://example.org/render?url=https://example.com/a.tif",
        "/vsicurl?use_head=no&url=https%3A%2F%2Fexample.org%2Fa.tif",
    ):
        assert raster_paths(source)[0].endswith("a.tif")
    with pytest.raises(UsageError, match="ftp is not one of"):
        prepare(tmp_path, "ftp://example.org/a.tif")


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
    gone = r"cannot be read: imagery\.tif is made of .*good\.tif, which is not there"
    with ImageReader(moved.path, (1,)) as reader, pytest.raises(SourceError, match=gone):
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


def test_a_size_of_pixels_beside_rasters_alone_is_answered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 64, 64)))
    for gsd, dry_run in ((1.0, True), (1.0, False), (None, False)):
        info = prepare_imagery(
            [str(path)], place_at(), tmp_path, tmp_path / "imagery.tif", gsd_m=gsd, settings=FetchSettings(),
            dry_run=dry_run,
        )  # fmt: skip
        assert ("The rasters keep their own pixels: --gsd 1 is what" in " ".join(info.notes)) == (gsd is not None)


class TestWholeness:
    """A copy or download that broke off opens as if nothing had happened: its header stands in front."""

    @pytest.fixture(params=["strips", "tiles", "cog", "big", "overviews within", "overviews beside"])
    def raster(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        path = tmp_path / "a.tif"
        extra: dict[str, dict[str, object]] = {
            "strips": {"interleave": "band"},
            "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
            "cog": {"driver": "COG", "compress": "deflate", "blocksize": 128},
            "big": {"tiled": True, "blockxsize": 64, "blockysize": 64, "BIGTIFF": "YES", "ENDIANNESS": "BIG"},
            "overviews within": {"tiled": True, "blockxsize": 64, "blockysize": 64},
            "overviews beside": {"tiled": True, "blockxsize": 64, "blockysize": 64},
        }
        write(path, noise((3, 320, 320)), **extra[request.param])
        if request.param.startswith("overviews"):
            with rasterio.Env(TIFF_USE_OVR=request.param.endswith("beside")), rasterio.open(path, "r+") as image:
                image.build_overviews([2, 4])
        return path

    def test_a_whole_one_is_believed(self, raster: Path) -> None:
        check_whole(str(raster))

    @pytest.mark.parametrize("left", [0.5, 0.8, 0.99])  # 0.8: where overviews begin
    def test_one_that_is_cut_off_is_a_sentence(self, raster: Path, left: float, tmp_path: Path) -> None:
        for path in (raster, raster.with_name("a.tif.ovr")):
            if path.exists():
                whole = path.read_bytes()
                path.write_bytes(whole[: int(len(whole) * left)])
                with pytest.raises(SourceError, match=r"a\.tif is (cut off|damaged|not a raster that GDAL can read)"):
                    prepare(tmp_path, raster)
                path.write_bytes(whole)
        assert not (tmp_path / "city" / "imagery.tif").exists()

    def test_one_found_whole_is_looked_at_again_where_it_changed(
        self, raster: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked: list[str] = []
        monkeypatch.setattr(whole, "_check", looked.append)
        check_whole(str(raster))
        check_whole(str(raster))
        assert len(looked) == 1
        os.utime(raster, ns=(0, 0))
        check_whole(str(raster))
        raster.with_name("a.tif.msk").write_bytes(b"")
        check_whole(str(raster))
        assert len(looked) == 3

    def test_damage_in_a_mask_of_its_own_is_damage(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tif", noise((3, 256, 256)), tiled=True, blockxsize=64, blockysize=64)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as image:
            image.write_mask(noise((1, 256, 256))[0] > 127)
        check_whole(str(path))
        beside = path.with_name("a.tif.msk")
        with open_raster(str(beside)) as mask:
            block = int(mask.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", 1))
        garbled = bytearray(beside.read_bytes())
        garbled[block : block + 64] = b"\xff" * 64
        beside.write_bytes(garbled)
        os.utime(beside, ns=(0, 0))
        with pytest.raises(SourceError, match=r"a\.tif is damaged: .* pixels cannot be read"):
            check_whole(str(path))

    def test_an_end_of_zeros_is_damage(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tif", noise((3, 256, 256)), driver="COG", blocksize=128, compress="deflate")
        whole = path.read_bytes()
        path.write_bytes(whole[:-60_000] + bytes(60_000))
        with pytest.raises(SourceError, match=r"a\.tif is damaged: \d+ of its \d+ blocks are holes"):
            check_whole(str(path))

    @pytest.mark.parametrize("compress", ["deflate", "lzw", "zstd", "jpeg"])
    def test_a_hole_in_the_middle_is_damage(self, tmp_path: Path, compress: str) -> None:
        path = tmp_path / "a.tif"
        write(path, noise((3, 512, 512)), tiled=True, blockxsize=64, blockysize=64, compress=compress)
        check_whole(str(path))
        whole = path.read_bytes()
        third = len(whole) // 3
        path.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
        with pytest.raises(SourceError, match=r"a\.tif is damaged: \d+ of its 64 blocks are holes full of zeros"):
            prepare(tmp_path, path)
        assert not (tmp_path / "city" / "imagery.tif").exists()

    @pytest.mark.parametrize("how", ["sampled", "nodata", "stretch", "later"])
    def test_garbled_blocks_are_a_sentence_where_they_are_read(self, tmp_path: Path, how: str) -> None:
        path = tmp_path / "a.tif"
        pixels = noise((3, 512, 512)).astype(np.uint16 if how == "stretch" else np.uint8)
        write(path, pixels, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
        with rasterio.open(path) as source:  # of 64 blocks the sixteen decoded are 0, 4, 8, 13, ...
            block = int(source.get_tag_item(f"BLOCK_OFFSET_{0 if how == 'sampled' else 2}_0", "TIFF", 1))
        whole = bytearray(path.read_bytes())
        whole[block + 2 : block + 1000] = np.random.default_rng(0).bytes(998)
        path.write_bytes(whole)
        nodata = {"nodata": 255} if how == "nodata" else {}
        if how != "later":
            with pytest.raises(SourceError, match=r"a\.tif is damaged: some of its pixels cannot be read"):
                prepare(tmp_path, path, **nodata)
            assert not (tmp_path / "city" / "imagery.tif").exists()
            return
        info = prepare(tmp_path, path)  # nothing is read where nothing must be known of the pixels
        with ImageReader(info.path) as reader, pytest.raises(SourceError, match="The imagery cannot be read"):
            reader.read(Projection(UTM, 1.0), window(512))

    def test_blocks_without_bytes_are_empty_ground(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        profile = {"width": 256, "height": 256, "count": 1, "dtype": "uint8", "crs": UTM, "tiled": True}
        with rasterio.open(
            path, "w", driver="GTiff", sparse_ok=True, blockxsize=64, blockysize=64, nodata=0,
            transform=rasterio.Affine(1, 0, WEST, 0, -1, NORTH), **profile,
        ) as image:  # fmt: skip
            image.write(noise((1, 64, 64)), window=rasterio.windows.Window(0, 0, 64, 64))
        check_whole(str(path))
