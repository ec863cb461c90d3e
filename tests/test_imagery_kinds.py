"""Rasters as users have them: palettes, depths, masks, lattices; each becomes the image that it is, or a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasters import NORTH, UTM, WEST, noise, place_at, prepare, window, write

from rsosm_cli.errors import SourceError
from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.imagery.reader import ImageReader

Pixels = tuple[NDArray[np.uint8], NDArray[np.bool_]]


def image_of(path: Path, bands: tuple[int, ...] = (1, 2, 3), size: int = 64) -> Pixels:
    """Return the pixels of 1 m from the north-western corner of the place."""
    with ImageReader(path, bands) as reader:
        return reader.read(Projection(UTM, 1.0), window(size))


def both_ways(tmp_path: Path, path: Path, bands: tuple[int, ...] = (1, 2, 3)) -> Pixels:
    """Return a raster's pixels as they are read from it, which are those of the imagery that is made of it."""
    image, valid = image_of(path, bands)
    made = image_of(prepare(tmp_path / path.stem[:20], path).path, bands)
    np.testing.assert_array_equal(made[0], image)
    np.testing.assert_array_equal(made[1], valid)
    return image, valid


LEFT = np.broadcast_to(np.arange(64) < 32, (64, 64))  # the western half


@pytest.mark.parametrize("nodata", [None, -9999.0])
def test_nan_is_missing_and_does_not_hide_what_lies_below(tmp_path: Path, nodata: float | None) -> None:
    values = np.random.default_rng(0).random((2, 64, 64)).astype(np.float32) + 1
    values[1, :, 32:] = np.nan  # NaN is no colour: one band is enough
    above = write(tmp_path / "above.tif", values, nodata=nodata)
    np.testing.assert_array_equal(both_ways(tmp_path, above, (1,))[1], LEFT)
    below = write(tmp_path / "below.tif", np.full((2, 64, 64), 1.5, np.float32))
    image, valid = image_of(prepare(tmp_path, below, above).path, (1, 2))
    assert valid.all()
    assert len(np.unique(image[1][~LEFT])) == 1
    assert image[1][~LEFT].min() > 0


def test_a_nodata_value_and_an_alpha_band_both_count(tmp_path: Path) -> None:
    for dtype in (np.uint8, np.uint16):
        opaque = np.iinfo(dtype).max
        pixels = np.full((4, 64, 64), opaque, dtype)
        pixels[:3] = noise((3, 64, 64))
        pixels[:3, :, 32:] = opaque  # white, and clear
        pixels[3, :, 32:] = 0
        pixels[:3, :10] = 0  # opaque, and nodata
        pixels[1, 20, 20] = 0  # no green is a colour
        path = write(tmp_path / f"{np.dtype(dtype)}.tif", pixels, alpha=True, nodata=0)
        expected = LEFT.copy()
        expected[:10] = False
        image, valid = both_ways(tmp_path, path)
        np.testing.assert_array_equal(valid, expected)
        if dtype == np.uint8:
            np.testing.assert_array_equal(image[:, valid], pixels[:3, valid])
        else:  # what is clear has no part in the stretch
            assert image[:, valid].mean() > 80


def test_a_palette_becomes_its_colours(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 3, (1, 64, 64)).astype(np.uint8)
    colours = np.array([(250, 10, 20), (30, 240, 40), (50, 60, 230)], np.uint8)
    path = write(tmp_path / "palette.tif", numbers, photometric="palette")
    with rasterio.open(path, "r+") as raster:
        raster.write_colormap(1, {i: (*c, 255) for i, c in enumerate(colours.tolist())})
    image, valid = both_ways(tmp_path, path)
    assert valid.all()
    np.testing.assert_array_equal(image, np.moveaxis(colours[numbers[0]], -1, 0))
    np.testing.assert_array_equal(image_of(prepare(tmp_path / "b", path, bands=(3,)).path, (1,))[0][0], image[2])
    numbers[0, :40, :40] = 2
    with rasterio.open(path, "r+") as raster:
        raster.write(numbers)
    plain = write(tmp_path / "plain.tif", np.moveaxis(colours[numbers[0]], -1, 0))
    white = [image_of(prepare(tmp_path / p.stem, p, nodata=50).path)[1] for p in (path, plain)]
    np.testing.assert_array_equal(*white)  # a value of --nodata is one of the colours, not a number
    with rasterio.open(path, "r+") as raster:
        raster.nodata = 1
    np.testing.assert_array_equal(both_ways(tmp_path / "n", path)[1], numbers[0] != 1)


def test_clear_colours_of_a_palette_are_missing(tmp_path: Path) -> None:
    numbers = np.where(LEFT, 1, 0).astype(np.uint8)[None]
    path = write(tmp_path / "a.tif", numbers, photometric="palette")
    with rasterio.open(path, "r+") as raster:
        raster.write_colormap(1, {0: (9, 9, 9, 255), 1: (200, 100, 50, 255)})
    clear = tmp_path / "clear.vrt"
    rasterio.shutil.copy(path, clear, driver="VRT")
    clear.write_text(clear.read_text().replace('c1="9" c2="9" c3="9" c4="255"', 'c1="9" c2="9" c3="9" c4="0"'))
    image, valid = both_ways(tmp_path, clear)
    np.testing.assert_array_equal(valid, LEFT)
    assert image[:, 0, 0].tolist() == [200, 100, 50]


def test_8_bit_rasters_stay_as_they_are_beside_others(tmp_path: Path) -> None:
    plain = noise((3, 64, 32))
    deep = np.random.default_rng(1).integers(2000, 9000, (3, 64, 32)).astype(np.uint16)
    paths = write(tmp_path / "plain.tif", plain), write(tmp_path / "deep.tif", deep, west=WEST + 32)
    info = prepare(tmp_path, *paths)
    image, _ = image_of(info.path)
    np.testing.assert_array_equal(image[:, :, :32], plain)
    alone, _ = image_of(prepare(tmp_path / "alone", paths[1], place=place_at(WEST + 32, width=30)).path)
    np.testing.assert_array_equal(image[:, :, 32:], alone[:, :, 32:])
    assert any("1 of 2 rasters is 8-bit and taken as it is; of the others, percentiles" in n for n in info.notes)


def test_reflectances_beside_counts_are_refused(tmp_path: Path) -> None:
    counts = write(tmp_path / "counts.tif", noise((3, 64, 64)).astype(np.uint16) * 30)
    shares = write(tmp_path / "shares.tif", noise((3, 64, 64)) / np.float32(255), west=WEST + 64)
    with pytest.raises(SourceError, match=r"shares\.tif holds float32 and .*counts\.tif uint16: one stretch"):
        prepare(tmp_path, counts, shares, place=place_at(width=120))
    assert not (tmp_path / "city" / "imagery.tif").exists()


def test_complex_numbers_are_no_image(tmp_path: Path) -> None:
    path = write(tmp_path / "radar.tif", np.ones((1, 64, 64), np.complex64))
    with pytest.raises(SourceError, match=r"radar\.tif holds complex numbers \(complex64\)"):
        prepare(tmp_path, path)


@pytest.mark.parametrize("degrees", [45, 30, 90])
def test_a_turned_raster_keeps_the_size_of_its_pixels(tmp_path: Path, degrees: float) -> None:
    transform = Affine(1, 0, WEST, 0, -1, NORTH) * Affine.translation(32, 0) * Affine.rotation(-degrees)
    path = tmp_path / "turned.tif"
    pixels = np.full((3, 64, 64), 128, np.uint8)
    pixels[1] = 40  # one single value would be no image
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8", crs=UTM,
                       transform=transform) as raster:  # fmt: skip
        raster.write(pixels)
    with rasterio.open(prepare(tmp_path, path).path) as made:
        assert made.res == pytest.approx((1, 1), rel=1e-6)
        assert (made.read(4) >= 128).sum() == pytest.approx(64 * 64, rel=0.02)
        assert set(np.unique(made.read(1)[made.read(4) == 255])) <= {127, 128}


def test_a_turned_raster_of_finer_pixels_decides_the_lattice(tmp_path: Path) -> None:
    coarse = write(tmp_path / "coarse.tif", noise((3, 16, 16)), px=4.0)
    fine = write(tmp_path / "fine.tif", noise((3, 64, 64)))
    with rasterio.open(fine, "r+") as raster:
        raster.transform = Affine(1, 0, WEST, 0, 1, NORTH - 64)  # rows from the south
    image, valid = image_of(prepare(tmp_path, coarse, fine).path)
    assert valid.all()
    np.testing.assert_array_equal(image, noise((3, 64, 64))[:, ::-1])


def test_a_mask_beside_a_raster_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 64, 64)))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as raster:
        raster.write_mask(LEFT)
    assert path.with_name("a.tif.msk").exists()
    np.testing.assert_array_equal(both_ways(tmp_path, path)[1], LEFT)


@pytest.fixture
def vrt(tmp_path: Path) -> Path:
    """A VRT that names its raster relative to itself."""
    (tmp_path / "sheets").mkdir()
    write(tmp_path / "sheets" / "a & b.tif", noise((3, 64, 64)))
    rasterio.shutil.copy(tmp_path / "sheets" / "a & b.tif", tmp_path / "all.vrt", driver="VRT")
    assert 'relativeToVRT="1">sheets/a &amp; b.tif<' in (tmp_path / "all.vrt").read_text()
    return tmp_path / "all.vrt"


def test_a_vrt_of_relative_names(tmp_path: Path, vrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(both_ways(tmp_path, vrt)[0], noise((3, 64, 64)))


def test_a_vrt_of_a_raster_that_is_gone_or_cut_off(tmp_path: Path, vrt: Path) -> None:
    inner = tmp_path / "sheets" / "a & b.tif"
    whole = inner.read_bytes()
    inner.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"a & b\.tif is (cut off|not a raster that GDAL can read)"):
        prepare(tmp_path, vrt)
    inner.unlink()
    with pytest.raises(SourceError, match=r"all\.vrt is made of .*a & b\.tif, which is not there"):
        prepare(tmp_path, vrt)
    assert not (tmp_path / "city" / "imagery.tif").exists()


def test_rows_from_the_south(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 64, 64)))
    with rasterio.open(path, "r+") as raster:
        raster.transform = Affine(1, 0, WEST, 0, 1, NORTH - 64)
    image, valid = both_ways(tmp_path, path)
    assert valid.all()
    np.testing.assert_array_equal(image, noise((3, 64, 64))[:, ::-1])


def test_one_grey_band(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((1, 64, 64)))
    assert prepare(tmp_path, path).bands == 1
    np.testing.assert_array_equal(both_ways(tmp_path, path, (1,))[0], noise((1, 64, 64)))


def test_near_infrared_is_no_alpha(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((4, 64, 64)), photometric="minisblack")
    with rasterio.open(path) as raster:
        assert ColorInterp.alpha not in raster.colorinterp
    assert prepare(tmp_path, path).bands == 4
    image, valid = both_ways(tmp_path, path, (4, 1))
    assert valid.all()
    np.testing.assert_array_equal(image, noise((4, 64, 64))[[3, 0]])


@pytest.mark.parametrize("nodata", [None, 255])
def test_near_infrared_that_is_declared_as_alpha_is_told_and_can_be_read(tmp_path: Path, nodata: int | None) -> None:
    """Of four 8-bit bands GDAL makes the last one alpha where the program that wrote them said nothing."""
    path = write(tmp_path / "a.tif", noise((4, 64, 64)))
    with rasterio.open(path) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    info = prepare(tmp_path, path, nodata=nodata)
    assert any("Band 4 of" in n and "read it as a band: --bands 1,2,3,4" in n for n in info.notes)
    named = prepare(tmp_path, path, bands=(1, 2, 3, 4), nodata=nodata)
    assert named.bands == 4
    assert not any("transparency" in n for n in named.notes)
    image, valid = image_of(named.path, (4, 1))
    assert valid.all()
    np.testing.assert_array_equal(image, noise((4, 64, 64))[[3, 0]])
    infrared, valid = image_of(prepare(tmp_path, path, bands=(4, 1, 2), nodata=nodata).path)
    assert valid.all()
    np.testing.assert_array_equal(infrared, noise((4, 64, 64))[[3, 0, 1]])


def test_transparency_with_soft_edges_is_none_of_it(tmp_path: Path) -> None:
    pixels = noise((4, 64, 64))
    pixels[3] = np.clip(np.arange(64) * 20 - 300, 0, 255)
    path = write(tmp_path / "a.tif", pixels)
    assert not any("transparency" in note for note in prepare(tmp_path, path).notes)
    chosen = prepare(tmp_path, path, bands=(3, 2, 1))  # what is clear stays so
    np.testing.assert_array_equal(image_of(chosen.path)[1], pixels[3] >= 128)


def test_a_grey_raster_beside_colours_is_shown_in_grey(tmp_path: Path) -> None:
    colours = write(tmp_path / "rgb.tif", noise((3, 64, 32)))
    grey = write(tmp_path / "grey.tif", noise((1, 64, 32), 1), west=WEST + 32, nodata=0)
    info = prepare(tmp_path, colours, grey)
    assert info.bands == 3
    assert any(f"{grey} is grey, and shown in grey beside the colours" in note for note in info.notes)
    image, valid = image_of(info.path)
    assert valid.all()
    np.testing.assert_array_equal(image[:, :, :32], noise((3, 64, 32)))
    np.testing.assert_array_equal(image[:, :, 32:], np.repeat(noise((1, 64, 32), 1), 3, axis=0))


def test_fewer_bands_than_colours_beside_colours_are_a_sentence(tmp_path: Path) -> None:
    colours = write(tmp_path / "rgb.tif", noise((3, 64, 64)))
    two = write(tmp_path / "two.tif", noise((2, 64, 64)), west=WEST + 64)
    heights = write(tmp_path / "heights.tif", noise((1, 64, 64)).astype(np.float32), west=WEST + 64)
    for few, has in ((two, "2 bands"), (heights, "1 band")):
        with pytest.raises(SourceError, match=rf"{few.name} has {has}, and .*rgb\.tif 3: .* gdal_translate"):
            prepare(tmp_path, colours, few, place=place_at(width=120))
        assert not (tmp_path / "city" / "imagery.tif").exists()
    far = write(tmp_path / "far.tif", noise((2, 64, 64)), west=WEST + 900)
    assert prepare(tmp_path, colours, far).bands == 3
    assert prepare(tmp_path, colours, two, bands=(1, 2), place=place_at(width=120)).bands == 2


def test_colours_with_and_without_infrared_keep_the_colours(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{n}.tif", noise((n, 64, 64)), west=WEST + 64 * (n - 3), photometric=p)
        for n, p in ((3, "rgb"), (4, "minisblack"))
    ]
    info = prepare(tmp_path, *paths, place=place_at(width=120))
    assert info.bands == 3
    assert "The rasters have 3 to 4 bands: of each, the first 3 are kept." in info.notes


@pytest.mark.parametrize("declared", [0, 65535, None])
def test_ground_of_16_bit_rasters_has_no_part_in_the_stretch(tmp_path: Path, declared: int | None) -> None:
    values = np.random.default_rng(0).integers(300, 900, (3, 64, 64)).astype(np.uint16)
    values[:, :, 32:] = 65535 if declared is None else declared
    path = write(tmp_path / "a.tif", values, nodata=declared)
    info = prepare(tmp_path, path, nodata=65535 if declared is None else None)
    assert info.stretch is not None
    assert all(300 < low < 350 and 850 < high < 900 for low, high in info.stretch)
    np.testing.assert_array_equal(image_of(info.path)[1], LEFT)


def test_negative_numbers_and_reflectances(tmp_path: Path) -> None:
    spread = np.random.default_rng(0).integers(-5000, 5000, (2, 64, 64))
    signed = both_ways(tmp_path, write(tmp_path / "signed.tif", spread.astype(np.int16), nodata=-32768), (1, 2))
    shares = (spread + 5000) / np.float32(10_000)
    real = both_ways(tmp_path, write(tmp_path / "real.tif", shares.astype(np.float32)), (1, 2))
    assert signed[1].all()
    assert real[1].all()
    assert 120 < signed[0].mean() < 135
    assert np.abs(signed[0].astype(int) - real[0]).max() <= 1


def test_two_utm_zones_meet(tmp_path: Path) -> None:
    west, north = 811_000.0, 3_060_000.0  # on both sides of 87 degrees east
    ramp = np.tile(np.linspace(20, 220, 300, dtype=np.uint8), (3, 120, 1))
    paths = [write(tmp_path / "a.tif", ramp[:, :, :150], crs="EPSG:32645", west=west - 150, north=north)]
    whole = write(tmp_path / "b.tif", ramp[:, :, 140:], crs="EPSG:32645", west=west - 10, north=north)
    with rasterio.open(whole) as source, rasterio.vrt.WarpedVRT(source, crs="EPSG:32646", add_alpha=True) as warped:
        rasterio.shutil.copy(warped, tmp_path / "c.tif", driver="GTiff")
    paths.append(tmp_path / "c.tif")
    place = shapely.box(*rasterio.warp.transform_bounds("EPSG:32645", "EPSG:4326", west - 140, north - 110, west + 140,
                                                        north - 10))  # fmt: skip
    info = prepare(tmp_path, *paths, place=place)
    assert info.crs == "EPSG:32645"
    col, row = int(west) - 150, -int(north)
    with ImageReader(info.path) as reader:
        image, valid = reader.read(Projection("EPSG:32645", 1.0), PixelBounds(col, row, col + 300, row + 120))
    inner = (slice(3, -3), slice(3, -3))
    assert valid[inner].all()
    assert np.abs(image[0].astype(int) - ramp[0])[inner].max() <= 2


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_a_raster_far_away_is_one_sentence(tmp_path: Path, crs: str) -> None:
    """Degrees that are called metres, and metres that are called degrees, too."""
    west, north = (85.5, 27.6) if crs == UTM else (WEST, NORTH)
    path = write(tmp_path / "far.tif", noise((3, 64, 64)), crs=crs, west=west, north=north)
    with pytest.raises(SourceError, match=r"far\.tif (does not meet the place|lies nowhere on the ground)"):
        prepare(tmp_path, path)
    with pytest.raises(SourceError, match=r"far\.tif (does not meet the place|lies nowhere on the ground)"):
        prepare(tmp_path, write(tmp_path / "far.tif", noise((3, 64, 64)), west=1e12, north=-1e12))


def test_a_crs_without_a_code(tmp_path: Path) -> None:
    own = "+proj=tmerc +lat_0=27.6 +lon_0=85.5 +k=1 +x_0=100000 +y_0=200000 +ellps=WGS84 +units=m"
    x, y = rasterio.warp.transform(UTM, own, [WEST], [NORTH])
    plain = np.full((3, 128, 128), 90, np.uint8)
    plain[2] = 40  # one single value would be no image
    path = write(tmp_path / "a.tif", plain, crs=own, west=x[0] - 30, north=y[0] + 30)
    with rasterio.open(path) as raster:
        assert raster.crs.to_epsg() is None
    info = prepare(tmp_path, path)
    image, valid = image_of(info.path)
    assert valid.all()
    assert image[:, 0, 0].tolist() == [90, 90, 40]
    assert (image == image[:, :1, :1]).all()
    code = write(tmp_path / "b.tif", np.full((3, 64, 64), 90, np.uint8), west=WEST + 64)
    assert prepare(tmp_path / "two", path, code, place=place_at(width=120)).count == 2


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform:rasterio.errors.NotGeoreferencedWarning")
def test_control_points_alone_are_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    corners = [(0, 0), (0, 64), (64, 0), (64, 64)]
    points = [GroundControlPoint(r, c, WEST + c, NORTH - r) for r, c in corners]
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8") as raster:
        raster.write(noise((3, 64, 64)))
        raster.gcps = (points, UTM)
    with pytest.raises(SourceError, match=r"scan\.tif has control points \(GCPs\) alone.*gdalwarp -t_srs"):
        prepare(tmp_path, path)


def test_a_name_as_long_as_a_name_can_be(tmp_path: Path) -> None:
    path = write(tmp_path / f"{'é' * 125}.tif", noise((3, 64, 64)), nodata=0)
    np.testing.assert_array_equal(both_ways(tmp_path, path)[0], noise((3, 64, 64)))


@pytest.mark.parametrize("kind", ["nodata", "alpha", "turned"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_missing_image_of_any_number_of_bands(tmp_path: Path, kind: str, count: int) -> None:
    """GDAL takes an alpha band for a mask of one or three bands alone."""
    pixels = noise((count, 64, 64))
    pixels[:, :, 32:] = 0
    alpha = np.where(LEFT, 255, 0).astype(np.uint8)[None]
    plain = {"photometric": "minisblack"}  # of four bands GDAL would call the last one alpha
    extra = plain | ({"alpha": True} if kind == "alpha" else {"nodata": 0})
    above = write(tmp_path / "a.tif", np.concatenate([pixels, alpha]) if kind == "alpha" else pixels, **extra)
    if kind == "turned":
        with rasterio.open(above, "r+") as raster:
            raster.transform = Affine(1, 0, WEST, 0, 1, NORTH - 64)
    bands = tuple(range(1, count + 1))
    np.testing.assert_array_equal(both_ways(tmp_path, above, bands)[1], LEFT)
    below = write(tmp_path / "below.tif", np.full((count, 64, 64), 70, np.uint8), **plain)
    image, valid = image_of(prepare(tmp_path, below, above).path, bands)
    assert valid.all()
    assert (image[:, ~LEFT] == 70).all()
    np.testing.assert_array_equal(image[:, LEFT], (pixels[:, ::-1] if kind == "turned" else pixels)[:, LEFT])
