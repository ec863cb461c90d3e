"""Mosaics of tile services and rasters, and of the real tiles of Banepa."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from fetch_inputs import write_photo
from tile_services import (
    PLACE,
    ZOOM,
    Answer,
    Service,
    fetch,
    serving_tiles,
)

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.imagery import prepare
from rsosm_cli.imagery.reader import ImageReader
from rsosm_cli.settings import FetchSettings


@pytest.fixture
def service() -> Iterator[Service]:
    with serving_tiles() as server:
        yield server


def test_a_service_and_a_raster_are_one_mosaic(service: Service, tmp_path: Path) -> None:
    alone = fetch(tmp_path / "alone", service.template)
    settings = FetchSettings(xyz_zoom=ZOOM, xyz_rate=5000)
    folder = tmp_path / "both"
    info = prepare.prepare_imagery(
        [str(alone.path), service.template], PLACE, folder, folder / "imagery.tif", gsd_m=None, settings=settings
    )
    assert info.kind == "vrt"
    assert len(info.sources) == 2
    with rasterio.open(info.path) as one, rasterio.open(alone.path) as other:
        np.testing.assert_array_equal(one.read(), other.read())


@pytest.mark.parametrize("photos", [0, 2])
@pytest.mark.parametrize("nodata", [None, 255])
def test_a_mosaic_with_downloaded_images_can_be_moved(
    service: Service, tmp_path: Path, photos: int, nodata: int | None
) -> None:
    settings = FetchSettings(xyz_zoom=ZOOM, xyz_rate=5000, nodata=nodata)
    folder = tmp_path / "city"
    # Of photos in another CRS, which is that of the mosaic, those of the service are warped.
    own = [str(write_photo(tmp_path / f"{n}.tif", box=PLACE.buffer(0.001).bounds)) for n in range(photos)]
    sources = [*own, service.template, f"{service.template}?layer=b"][: 3 if photos else 2]
    prepare.prepare_imagery(sources, PLACE, folder, folder / "imagery.tif", gsd_m=None, settings=settings)
    with rasterio.open(folder / "imagery.tif") as image:
        before = image.read()
        assert image.crs.to_epsg() == (4326 if photos else 3857)
    moved = folder.rename(tmp_path / "moved")
    with rasterio.open(moved / "imagery.tif") as image:
        np.testing.assert_array_equal(image.read(), before)


@pytest.mark.shared
def test_banepas_tiles_served_are_its_mosaic(shared: Path, tmp_path: Path, service: Service) -> None:
    banepa = shared / "data" / "banepa"

    def answer(z: int, x: int, y: int, n: int) -> Answer:
        path = banepa / "chips_z19" / f"OAM-{x}-{y}-{z}.tif"
        return (200, {"Content-Type": "image/jpeg"}, path.read_bytes()) if path.exists() else (404, {}, b"")

    service.answer = answer
    place = shapely.box(85.5205, 27.6310, 85.5213, 27.6317)
    info = fetch(tmp_path, service.template, place=place, xyz_zoom=None, gsd_m=0.15)
    assert any("at zoom 19: 512 px" in note for note in info.notes)
    projection = Projection("EPSG:32645", 0.6)
    box = rasterio.warp.transform_bounds("EPSG:4326", "EPSG:32645", *place.bounds)
    bounds: PixelBounds = projection.pixels_around(*box)
    with ImageReader(info.path) as tiles, ImageReader(banepa / "mosaic_0.3m.tif") as mosaic:
        image, valid = tiles.read(projection, bounds)
        expected, there = mosaic.read(projection, bounds)
    assert valid.all()
    assert there.all()
    difference = np.abs(image.astype(int) - expected)
    assert difference.mean() < 3.5  # the mosaic was averaged and compressed once more
    assert np.percentile(difference, 99) <= 16
    assert np.abs(image[:, :, 1:].astype(int) - expected[:, :, :-1]).mean() > 2 * difference.mean()
