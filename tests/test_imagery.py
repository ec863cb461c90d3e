"""Imagery: windows on a fixed lattice, mosaics without copies, missing image."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from listening import Listener, Task
from numpy.typing import NDArray
from rasters import COL, NORTH, ROW, UTM, WEST, noise, place_at, prepare, window, write

from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.imagery.missing import missing_pixels
from rsosm_cli.imagery.prepare import prepare_imagery
from rsosm_cli.imagery.reader import BLOCK_PX, ImageReader
from rsosm_cli.settings import FetchSettings


def test_a_window_on_the_rasters_own_pixels_is_the_raster(tmp_path: Path) -> None:
    pixels = noise((3, 80, 90))
    with ImageReader(write(tmp_path / "a.tif", pixels), (3, 1)) as reader:
        image, valid = reader.read(Projection(UTM, 1.0), window(100, -5, -5))
    assert image.dtype == np.uint8
    assert image.shape == (2, 100, 100)
    assert valid.sum() == 80 * 90
    np.testing.assert_array_equal(image[:, 5:85, 5:95], pixels[[2, 0]])
    assert not image[:, ~valid].any()


def test_a_coarser_window_averages_all_pixels_under_it(tmp_path: Path) -> None:
    pixels = noise((1, 90, 90))
    with ImageReader(write(tmp_path / "a.tif", pixels), (1,)) as reader:
        image, valid = reader.read(Projection(UTM, 3.0), PixelBounds(COL // 3, ROW // 3, COL // 3 + 30, ROW // 3 + 30))
    # The corner of the raster is 0 or 1 m off the coarse lattice's pixels: only whole ones are compared.
    left, top = COL // 3 * 3 - COL, ROW // 3 * 3 - ROW
    means = pixels[0, 3 + top : 87 + top, 3 + left : 87 + left].reshape(28, 3, 28, 3).mean(axis=(1, 3))
    assert valid[1:29, 1:29].all()
    assert np.abs(image[0, 1:29, 1:29] - means).max() <= 0.5 + 1e-6


def test_a_finer_window_interpolates(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8), (1, 50, 100)).copy()
    with ImageReader(write(tmp_path / "a.tif", ramp), (1,)) as reader:
        image, _ = reader.read(
            Projection(UTM, 0.5), PixelBounds(2 * COL + 20, 2 * ROW + 20, 2 * COL + 60, 2 * ROW + 22)
        )
    np.testing.assert_allclose(np.diff(image[0, 0].astype(int)), 1, atol=1)
    assert len(np.unique(image[0, 0])) == 40


@pytest.mark.parametrize(("crs", "px", "gsd"), [(UTM, 1.0, 1.7), ("EPSG:4326", 1e-5, 0.6), ("EPSG:3857", 1.1, 2.3)])
def test_windows_agree_bit_for_bit_with_one_big_window(tmp_path: Path, crs: str, px: float, gsd: float) -> None:
    """The seams that resampling window by window would leave."""
    west, north = rasterio.warp.transform(UTM, crs, [WEST], [NORTH])
    path = write(tmp_path / "a.tif", noise((2, 700, 900)), crs=crs, px=px, west=west[0], north=north[0])
    projection = Projection("EPSG:32645", gsd)
    with ImageReader(path, (1, 2)) as reader, ImageReader(path, (1, 2), cache_mb=0) as other:
        whole = projection.pixels_around(*reader.bounds_in(UTM)).padded(7)
        image, valid = reader.read(projection, whole)
        assert valid.any()
        assert not valid.all()
        rng = np.random.default_rng(1)
        for _ in range(25):
            col, row = rng.integers(0, whole.width - 50), rng.integers(0, whole.height - 60)
            part = PixelBounds(
                whole.col_min + col, whole.row_min + row, whole.col_min + col + 50, whole.row_min + row + 60
            )
            one, there = other.read(projection, part)
            np.testing.assert_array_equal(one, image[:, row : row + 60, col : col + 50])
            np.testing.assert_array_equal(there, valid[row : row + 60, col : col + 50])


def test_windows_away_from_the_raster_are_invalid_and_blocks_do_not_pile_up(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise((3, 1200, 1200)))
    projection = Projection(UTM, 1.0)
    with ImageReader(path, cache_mb=2) as reader:
        image, valid = reader.read(projection, window(30, 100_000_000, 0))
        assert image.shape == (3, 30, 30)
        assert not image.any()
        assert not valid.any()
        reader.read(projection, window(1200))
        assert sum(block.nbytes for block in reader._blocks.values()) <= 2 * 2**20
        assert len(reader._blocks) == 2 * 2**20 // (4 * BLOCK_PX**2)
        again = pickle.loads(pickle.dumps(reader))
        np.testing.assert_array_equal(again.read(projection, window())[0], reader.read(projection, window())[0])
        again.close()


def test_a_much_coarser_window_reads_an_overview_that_it_still_averages(tmp_path: Path) -> None:
    pixels = np.repeat(np.repeat(noise((1, 16, 16)), 64, axis=1), 64, axis=2)
    path = write(tmp_path / "a.tif", pixels, tiled=True)
    projection = Projection(UTM, 64.0)
    bounds = PixelBounds(COL // 64, ROW // 64, COL // 64 + 16, ROW // 64 + 16)
    with ImageReader(path, (1,)) as reader:
        expected, there = reader.read(projection, bounds)
    with rasterio.open(path, "r+") as raster:
        raster.build_overviews([2, 4, 8, 16, 32], rasterio.enums.Resampling.nearest)
        raster.write(np.zeros((1, 1024, 1024), np.uint8))  # who reads the whole raster now reads black
    with ImageReader(path, (1,)) as reader:
        image, valid = reader.read(projection, bounds)
        fine, _ = reader.read(Projection(UTM, 1.0), window())
    both = valid & there  # the edge of the raster cuts pixels, and may fall either way
    assert both.sum() >= 15 * 15
    assert np.abs(image.astype(int) - expected)[:, both].max() <= 1
    assert not fine.any()


def test_nodata_alpha_and_mask_are_missing_image(tmp_path: Path) -> None:
    pixels = noise((3, 64, 64))
    pixels[:, :20, :20] = 0
    pixels[0, 40, 40] = 0  # no red is a colour
    gone = np.zeros((64, 64), bool)
    gone[:20, :20] = True
    alpha = np.where(gone, 0, 255).astype(np.uint8)
    masked = write(tmp_path / "mask.tif", pixels)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(masked, "r+") as raster:
        raster.write_mask(alpha)
    paths = [
        write(tmp_path / "nodata.tif", pixels, nodata=0),
        write(tmp_path / "alpha.tif", np.concatenate([pixels, alpha[None]]), alpha=True),
        masked,
    ]
    for path in paths:
        info = prepare(tmp_path / path.stem, path)
        for file in (path, info.path):
            with ImageReader(file) as reader:
                assert reader.count == 3
                image, valid = reader.read(Projection(UTM, 1.0), window())
            np.testing.assert_array_equal(valid, ~gone)
            np.testing.assert_array_equal(image, pixels)


def test_averages_next_to_missing_image_are_not_darkened(tmp_path: Path) -> None:
    pixels = np.full((2, 64, 64), 200, np.uint8)
    pixels[1] = 255
    pixels[:, :, :31] = 0
    with ImageReader(write(tmp_path / "a.tif", pixels, alpha=True), (1,)) as reader:
        image, valid = reader.read(Projection(UTM, 2.0), PixelBounds(COL // 2, ROW // 2, COL // 2 + 32, ROW // 2 + 32))
    assert valid[16, 15]  # half covered
    assert set(np.unique(image[0][valid])) <= {199, 200}
    assert not valid[16, 14]


def test_16_bit_is_stretched_by_its_percentiles_and_recorded(tmp_path: Path) -> None:
    left = np.random.default_rng(0).integers(300, 900, (2, 64, 64)).astype(np.uint16)
    right = left + np.uint16(100)
    paths = [write(tmp_path / "a.tif", left), write(tmp_path / "b.tif", right, west=WEST + 64)]
    info = prepare(tmp_path, *paths)
    assert info.stretch is not None
    (low, high), _ = info.stretch
    assert 300 < low < 350
    assert 950 < high < 1000
    with ImageReader(info.path, (1,)) as reader:
        image, valid = reader.read(Projection(UTM, 1.0), PixelBounds(COL, ROW, COL + 128, ROW + 64))
    assert valid.all()
    both = np.concatenate([left, right], axis=2)[0]
    expected = np.clip(np.rint((both - low) * 255 / (high - low)), 0, 255)
    assert np.abs(image[0] - expected).max() <= 1  # one stretch for both: no step at the joint
    with ImageReader(paths[0], (1,)) as alone:
        assert alone.stretch is not None


def test_bands_are_chosen_and_each_keeps_its_own_stretch(tmp_path: Path) -> None:
    base = np.random.default_rng(0).integers(300, 900, (4, 64, 64)).astype(np.uint16)
    pixels = base + np.arange(4, dtype=np.uint16)[:, None, None] * np.uint16(5000)
    path = write(tmp_path / "a.tif", pixels)
    info = prepare(tmp_path, path, bands=(4, 2, 1))
    assert info.chosen == (4, 2, 1)
    assert info.bands == 3
    assert info.stretch is not None
    assert [round(low, -3) for low, _ in info.stretch] == [15_000, 5_000, 0]
    with ImageReader(info.path) as reader, ImageReader(path, (4, 2, 1)) as whole:
        bounds = PixelBounds(COL, ROW, COL + 64, ROW + 64)
        np.testing.assert_array_equal(
            reader.read(Projection(UTM, 1.0), bounds)[0], whole.read(Projection(UTM, 1.0), bounds)[0]
        )
    with pytest.raises(UsageError, match=r"has 4 bands, and band 5 is asked for"):
        prepare(tmp_path, path, bands=(5,))


def test_rasters_of_several_crs_become_one(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(20, 220, 200, dtype=np.uint8), (3, 120, 1))
    first = write(tmp_path / "a.tif", ramp[:, :, :100])
    second = write(tmp_path / "b.tif", ramp[:, :, 100:], west=WEST + 100)
    with rasterio.open(second) as source:
        box = source.bounds
        foreign = tmp_path / "c.tif"
        with rasterio.vrt.WarpedVRT(source, crs="EPSG:3857", add_alpha=True) as warped:
            rasterio.shutil.copy(warped, foreign, driver="GTiff")
    assert box.right == WEST + 200
    info = prepare(tmp_path, first, foreign)
    assert info.crs == UTM
    assert f"1 of 2 rasters is resampled to the grid of the imagery ({UTM}) when read." in info.notes
    with rasterio.open(info.path) as mosaic:
        assert mosaic.driver == "VRT"
        assert mosaic.crs.to_epsg() == 32645
    with ImageReader(info.path) as reader:
        image, valid = reader.read(Projection(UTM, 1.0), PixelBounds(COL, ROW, COL + 200, ROW + 120))
    inner = (slice(3, -3), slice(3, -3))
    assert valid[inner].all()
    assert np.abs(image[0].astype(int) - ramp[0])[inner].max() <= 2


def test_the_later_raster_is_on_top_where_it_has_image(tmp_path: Path) -> None:
    below = write(tmp_path / "below.tif", np.full((3, 64, 64), 50, np.uint8))
    pixels = np.full((3, 64, 64), 90, np.uint8)
    pixels[:, 32:] = 0
    above = write(tmp_path / "above.tif", pixels, nodata=0)
    with ImageReader(prepare(tmp_path, below, above).path) as reader:
        image, valid = reader.read(Projection(UTM, 1.0), window())
    assert valid.all()
    assert (image[:, :32] == 90).all()
    assert (image[:, 32:] == 50).all()


def test_white_ground_is_missing_only_on_request_and_small_white_things_stay(tmp_path: Path) -> None:
    pixels = noise((3, 64, 700))
    pixels[:, :, 300:] = 255
    pixels[:, 5:15, 5:15] = 255
    path = write(tmp_path / "a.tif", pixels)
    expected = np.ones((64, 700), bool)
    for value, settings in ((True, {}), (False, {"nodata": 255})):
        info = prepare(tmp_path, path, **settings)
        assert info.nodata == settings.get("nodata")
        with ImageReader(info.path) as reader:
            _, valid = reader.read(Projection(UTM, 1.0), PixelBounds(COL, ROW, COL + 700, ROW + 64))
        expected[:, 300:] = value
        np.testing.assert_array_equal(valid, expected)


def test_missing_image_of_many_rasters_is_one_piece_of_work(tmp_path: Path) -> None:
    listener = Listener()
    paths = [str(write(tmp_path / f"{i}.tif", noise((3, 64, 64)), west=WEST + 64 * i)) for i in range(5)]
    prepare_imagery(
        paths, place_at(width=300), tmp_path, tmp_path / "imagery.tif", gsd_m=None, settings=FetchSettings(nodata=255),
        progress=listener,
    )  # fmt: skip
    assert listener.tasks == [Task("looking for missing image", 5 * 64, 5 * 64, 5 * 64)]


@pytest.mark.parametrize("kind", ["nan", "nodata", "nodata16", "alpha", "white"])
def test_imagery_without_a_pixel_of_image_is_refused_and_what_was_there_stays(tmp_path: Path, kind: str) -> None:
    empty: dict[str, tuple[NDArray[np.generic], dict[str, object]]] = {
        "nan": (np.full((3, 64, 64), np.nan, np.float32), {}),
        "nodata": (np.full((3, 64, 64), 255, np.uint8), {"nodata": 255}),
        "nodata16": (np.zeros((3, 64, 64), np.uint16), {"nodata": 0}),
        "alpha": (np.concatenate([noise((3, 64, 64)), np.zeros((1, 64, 64), np.uint8)]), {"alpha": True}),
        "white": (np.full((3, 64, 64), 255, np.uint8), {}),
    }
    good = prepare(tmp_path, write(tmp_path / "good.tif", noise((3, 64, 64)))).path
    before = good.read_bytes()
    pixels, extra = empty[kind]
    path = write(tmp_path / "empty.tif", pixels, **extra)
    with pytest.raises(SourceError, match=r"empty\.tif holds no image of the place"):
        prepare(tmp_path, path, nodata=255 if kind == "white" else None)
    assert good.read_bytes() == before
    assert not list(good.parent.glob(".imagery*"))
    other = write(tmp_path / "other.tif", pixels, west=WEST + 64, **extra)
    with pytest.raises(SourceError, match="Each of the 2 rasters holds no image"):
        prepare(tmp_path, path, other, nodata=255 if kind == "white" else None, place=place_at(width=120))


@pytest.mark.parametrize("kind", ["black", "white", "constant16", "half"])
def test_one_single_value_all_over_is_no_image(tmp_path: Path, kind: str) -> None:
    pixels = np.full((3, 64, 64), 255 if kind == "white" else 0, np.uint8)
    if kind == "constant16":
        pixels = pixels.astype(np.uint16) + np.uint16(700)
    extra = {"nodata": 9} if kind == "half" else {}
    if kind == "half":  # the rest is missing
        pixels[:, :, 40:] = 9
    path = write(tmp_path / "plain.tif", pixels, **extra)
    value = pixels[0, 0, 0]
    said = rf"plain\.tif shows no image .* is {value} in every band.*--nodata {value}\."
    with pytest.raises(SourceError, match=said):
        prepare(tmp_path, path)
    assert not (tmp_path / "city" / "imagery.tif").exists()
    water = np.broadcast_to(np.array([20, 60, 90], np.uint8)[:, None, None], (3, 64, 64))
    prepare(tmp_path, write(tmp_path / "water.tif", water.astype(pixels.dtype)))
    prepare(tmp_path, path, write(tmp_path / "beside.tif", noise((3, 64, 64)).astype(pixels.dtype), west=WEST + 20))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_little_image_is_told_and_found_where_it_lies(tmp_path: Path, dtype: str) -> None:
    missing = 0 if dtype == "uint8" else np.nan
    pixels = np.full((3, 2000, 2000), missing, dtype)
    pixels[:, 300:460, 1130:1290] = noise((3, 160, 160))  # 0.6 % of it
    path = write(tmp_path / "a.tif", pixels, nodata=missing if dtype == "uint8" else None)
    info = prepare(tmp_path, path, place=place_at(width=2000, height=2000))
    assert any(re.fullmatch(r"The imagery covers some 0\..* pixels there are missing.*", note) for note in info.notes)
    inside = prepare(tmp_path, path, place=place_at(WEST + 1140, NORTH - 310))
    assert [note for note in inside.notes if "covers" in note] == []


def test_half_of_an_image_is_told(tmp_path: Path) -> None:
    pixels = noise((3, 400, 400))
    pixels[:, :, 200:] = 0
    path = write(tmp_path / "a.tif", pixels, nodata=0)
    notes = " ".join(prepare(tmp_path, path, place=place_at(width=400, height=400)).notes)
    found = re.search(r"covers some (\d+) % of the place; the rest of its pixels there are missing", notes)
    assert found is not None
    assert int(found[1]) == pytest.approx(50, abs=5)


def test_missing_pixels_of_lossy_images_take_their_blurred_edge() -> None:
    image = np.full((3, 100, 100), 120, np.uint8)
    image[:, :, 40:] = 253
    image[:, :, 36:40] = 240
    assert not missing_pixels(image, 255, lossy=False).any()
    np.testing.assert_array_equal(missing_pixels(image, 255, lossy=True)[50], np.arange(100) >= 36)


@pytest.mark.shared
@pytest.mark.parametrize("gsd", [0.6, 0.3])
def test_banepa_as_one_file_and_as_its_374_tiles(shared: Path, tmp_path: Path, gsd: float) -> None:
    """A mosaic in EPSG:3857 and JPEG tiles in EPSG:4326 of half its pixel size, on the same ground."""
    banepa = shared / "data" / "banepa"
    place = shapely.box(85.5145, 27.6286, 85.5285, 27.638)
    tiles = prepare(tmp_path, banepa / "chips_z19", place=place)
    assert (tiles.count, tiles.bands, tiles.crs) == (374, 3, "EPSG:4326")
    side = round(300 / gsd)
    with ImageReader(banepa / "mosaic_0.3m.tif") as mosaic, ImageReader(tiles.path) as reader:
        west, _, _, north = mosaic.bounds_in(UTM)
        projection = Projection(UTM, gsd)
        corner = projection.pixels_around(west + 600, 0, west + 601, north - 500)
        bounds = PixelBounds(corner.col_min, corner.row_min, corner.col_min + side, corner.row_min + side)
        expected, there = mosaic.read(projection, bounds)
        image, valid = reader.read(projection, bounds)
    assert there.all()
    assert valid.all()
    assert expected.std() > 20
    difference = np.abs(image.astype(int) - expected)
    # JPEG twice, and 0.3 m pixels that were averaged once before: not equal, but nowhere shifted.
    assert difference.mean() < (3 if gsd == 0.6 else 5)
    shifted = np.abs(image[:, :, 1:].astype(int) - expected[:, :, :-1]).mean()
    assert shifted > 2 * difference.mean()


@pytest.mark.shared
def test_white_ground_of_banepa_is_found(shared: Path, tmp_path: Path) -> None:
    banepa = shared / "data" / "banepa"
    place = shapely.box(85.5145, 27.6286, 85.5285, 27.638)
    info = prepare(tmp_path, banepa / "mosaic_0.3m.tif", place=place, nodata=255)
    projection = Projection(UTM, 1.2)
    with ImageReader(banepa / "mosaic_0.3m.tif") as plain, ImageReader(info.path) as reader:
        bounds = projection.pixels_around(*plain.bounds_in(UTM))
        image, before = plain.read(projection, bounds)
        _, after = reader.read(projection, bounds)
    gone = before & ~after
    assert 0.005 < gone.mean() < 0.02
    assert image[:, gone].min(axis=0).mean() > 250
    # Nothing large and white is left: what is, is roofs.
    assert (image.min(axis=0)[after] == 255).mean() < 0.002
