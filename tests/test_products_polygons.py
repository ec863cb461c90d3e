"""Rasters and polygons of a map."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.features import rasterize

from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.products import polygons as module
from rsosm_cli.products.polygons import polygonise, write_polygons
from rsosm_cli.products.raster import RasterForm, write_categories, write_cog, write_mosaic, write_part

UTM = Projection("EPSG:32645", 0.5)
COLOURS = ((70, 130, 180), (60, 160, 60), (200, 80, 80))


def blobs(height: int, width: int, classes: int = 3, seed: int = 0) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.standard_normal((height, width)), 6) for _ in range(classes)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def raster_of(folder: Path, values: np.ndarray, name: str = "c", scale: int = 1) -> Path:
    path = folder / f"{name}.tif"
    height, width = values.shape
    write_part(path, values, Projection(UTM.crs, UTM.gsd_m * scale), PixelBounds(0, 0, width, height), 255)
    return path


def test_strips_become_one_cog_with_everything_that_a_gis_shows(tmp_path: Path) -> None:
    values = blobs(1100, 700)
    values[:40] = 255
    area = PixelBounds(100, -300, 800, 800)
    parts = []
    for top in range(0, 1100, 512):
        box = PixelBounds(100, -300 + top, 800, min(-300 + top + 512, 800))
        parts.append((tmp_path / f"s{top}.tif", box))
        write_part(parts[-1][0], values[top : top + 512], UTM, box, 255)
    form = RasterForm(
        "uint8", 255, ("Land use",), COLOURS, ("wäter", "green <b>", "built"), resampling="MODE",
        tags={"TIFFTAG_COPYRIGHT": "© OpenStreetMap contributors"},
    )  # fmt: skip
    write_mosaic(tmp_path / "m.vrt", parts, UTM, area, form)
    target = tmp_path / "out" / "ufz.tif"
    write_cog(tmp_path / "m.vrt", target, form, parts=[p for p, _ in parts])
    names = write_categories(target, form)
    with rasterio.open(target) as raster:
        np.testing.assert_array_equal(raster.read(1), values)
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.overviews(1) == [2, 4]
        assert raster.nodata == 255
        assert raster.colormap(1)[2] == (200, 80, 80, 255)
        assert raster.bounds == (50, -400, 400, 150)
        assert raster.tags()["TIFFTAG_COPYRIGHT"] == "© OpenStreetMap contributors"
    assert "<Category>green &lt;b&gt;</Category>" in names.read_text(encoding="utf-8")
    assert [p.name for p in sorted(target.parent.iterdir())] == ["ufz.tif", "ufz.tif.aux.xml"]


@pytest.mark.parametrize("simplify", [0.0, 1.0])
def test_polygons_share_their_borders_and_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simplify: float
) -> None:
    monkeypatch.setattr(module, "BAND_PX", 64 * 260)  # many bands, so that polygons are cut and joined
    values = blobs(300, 260)
    values[:, :20] = 255
    found = polygonise(raster_of(tmp_path, values), simplify_px=simplify)
    assert shapely.is_valid(found.geometry).all()
    assert shapely.coverage_is_valid(found.geometry)
    for k in range(3):
        assert found.area_m2[found.value == k].sum() == pytest.approx((values == k).sum() * 0.25)
        areas = found.area_m2[found.value == k]
        assert (np.diff(areas) <= 0).all()
    drawn = rasterize(
        zip(found.geometry, found.value.tolist(), strict=True), out_shape=values.shape, fill=255,
        transform=rasterio.transform.from_origin(0, 0, 0.5, 0.5), dtype="uint8",
    )  # fmt: skip
    agreement = (drawn == values).mean()
    assert agreement == 1 if simplify == 0 else agreement > 0.98
    whole = polygonise(raster_of(tmp_path, values, "again"), simplify_px=simplify)
    assert len(found) == len(whole)


def test_fewer_points_where_outlines_are_simplified(tmp_path: Path) -> None:
    path = raster_of(tmp_path, blobs(200, 200))
    points = [shapely.get_num_coordinates(polygonise(path, simplify_px=s).geometry).sum() for s in (0.0, 1.0)]
    assert points[1] < points[0] / 2


def test_holes_small_polygons_skipped_classes_and_confidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND_PX", 16 * 64)
    values = np.zeros((64, 64), np.uint8)
    values[8:40, 8:40] = 1
    values[16:24, 16:24] = 2  # a hole in class 1
    values[50:52, 50:52] = 1  # 1 m2
    sure = np.full((16, 16), 80, np.uint8)
    sure[4:6, 4:6] = 50  # under the hole
    found = polygonise(
        raster_of(tmp_path, values), skip={0}, confidence=raster_of(tmp_path, sure, "sure", 4), min_area_m2=2,
        simplify_px=0,
    )  # fmt: skip
    assert found.value.tolist() == [1, 2]
    assert len(found.geometry[0].interiors) == 1
    assert found.area_m2.tolist() == [(32 * 32 - 64) * 0.25, 16]
    assert found.perimeter_m.tolist() == [(128 + 32) * 0.5, 16]
    assert found.confidence.tolist() == pytest.approx([0.8, 0.5])


def test_geopackage_is_readable_and_the_same_every_time(tmp_path: Path) -> None:
    found = polygonise(raster_of(tmp_path, blobs(80, 80)))
    files = [tmp_path / "a" / "ufz.gpkg", tmp_path / "b" / "ufz.gpkg"]
    for file in files:
        write_polygons(file, found, ["water", "green", "built"], "ufz")
    table = geopandas.read_file(files[0])
    assert table.crs.to_epsg() == 32645
    assert set(table["class"]) == {"water", "green", "built"}
    assert {"area_m2", "perimeter_m", "confidence"} <= set(table.columns)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [p.name for p in files[0].parent.iterdir()] == ["ufz.gpkg"]


def test_a_map_without_polygons_is_an_empty_layer(tmp_path: Path) -> None:
    found = polygonise(raster_of(tmp_path, np.full((32, 32), 255, np.uint8)))
    assert len(found) == 0
    write_polygons(tmp_path / "e.gpkg", found, ["a", "b"], "e")
    assert len(geopandas.read_file(tmp_path / "e.gpkg")) == 0
