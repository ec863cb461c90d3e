"""Labels on the tile grid: rasters, polygons, points; what is labelled ground and what is not."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from shapely.geometry import Point, box

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.settings import ClassSettings, TaskSettings
from rsosm_cli.tiles.label_files import read_frame
from rsosm_cli.tiles.labels import IGNORE, label_tiles, read_labels

CRS = "EPSG:32645"
# A place in the middle of zone 45, on a lattice of 2 m pixels and 16-pixel tiles.
X0, Y0 = 500_000.0, 3_056_000.0
TILE_PX, GSD = 16, 2.0
SIDE = TILE_PX * GSD


def tiles(columns: int, rows: int) -> np.ndarray:
    col, row = np.meshgrid(np.arange(columns), np.arange(rows))
    west, north = X0 + col.ravel() * SIDE, Y0 - row.ravel() * SIDE
    return np.column_stack([west, north - SIDE, west + SIDE, north])


def task(**changes: object) -> TaskSettings:
    classes = (
        ClassSettings(name="water", colour="#0000ff", value=1),
        ClassSettings(name="green", colour="#00ff00", value=2),
    )
    return TaskSettings.model_validate({"name": "ufz", "classes": classes, **changes})


def regression(**changes: object) -> TaskSettings:
    return TaskSettings.model_validate(
        {"name": "pop", "kind": "regression", "loss": "mse", "attribute": "v", **changes}
    )


def save(path: Path, shapes: list, crs: str = CRS, **columns: list) -> Path:
    geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs).to_file(path)
    return path


def test_polygons_take_their_classes_and_the_rest_is_no_label(tmp_path):
    shapes = [box(X0, Y0 - SIDE, X0 + SIDE / 2, Y0), box(X0 + SIDE, Y0 - SIDE, X0 + 2 * SIDE, Y0)]
    path = save(tmp_path / "a.gpkg", shapes, **{"class": ["Water", "2"]})
    found = label_tiles(read_labels([path], task(), CRS), tiles(3, 2), TILE_PX)
    assert found.tiles.tolist() == [0, 1]
    assert (found.classes[0][:, :8] == 0).all()
    assert (found.classes[0][:, 8:] == IGNORE).all()
    assert (found.classes[1] == 1).all()


def test_labels_in_another_crs_fall_on_the_same_pixels(tmp_path):
    shape = box(X0 + 6, Y0 - 22, X0 + 24, Y0 - 4)
    ours = save(tmp_path / "utm.gpkg", [shape], **{"class": ["water"]})
    lonlat = reproject(np.array([shapely.segmentize(shape, 1)], dtype=object), CRS, WGS84)
    theirs = save(tmp_path / "lonlat.geojson", list(lonlat), WGS84, **{"class": ["water"]})
    a, b = (label_tiles(read_labels([p], task(), CRS), tiles(1, 1), TILE_PX).classes for p in (ours, theirs))
    assert (a == b).all()


def test_background_fills_the_extent_and_nothing_beyond(tmp_path):
    building = task(
        name="building",
        background="other",
        classes=(ClassSettings(name="other", colour="#000000"), ClassSettings(name="building", colour="#ff0000")),
    )
    path = save(tmp_path / "b.gpkg", [box(X0 + 4, Y0 - 12, X0 + 12, Y0 - 4)], height=[3])  # no attribute `class`
    west, south, east, north = shapely.bounds(
        reproject(np.array([box(X0, Y0 - SIDE, X0 + SIDE / 2, Y0)], dtype=object), CRS, WGS84)[0]
    )
    labels = read_labels([path], building, CRS, extent=(west, south, east, north))
    classes = label_tiles(labels, tiles(2, 1), TILE_PX).classes[0]
    assert (classes[2:6, 2:6] == 1).all()
    assert (classes == 1).sum() == 16
    assert (classes[:, :7] != IGNORE).all()
    assert (classes[:, 9:] == IGNORE).all()  # a box in degrees is not quite one in metres: a pixel of tolerance
    hull = label_tiles(read_labels([path], building, CRS), tiles(2, 1), TILE_PX).classes[0]
    assert (hull == 0).sum() == 0  # without an extent, background ends with the labels' hull: here the building itself
    assert "convex hull" in read_labels([path], building, CRS).notes[0]


def test_ignored_polygons_are_not_background(tmp_path):
    binary = task(background="water", ignore=(255,))
    shapes = [box(X0, Y0 - SIDE, X0 + SIDE, Y0), box(X0, Y0 - SIDE / 2, X0 + SIDE / 2, Y0)]
    path = save(tmp_path / "a.gpkg", shapes, **{"class": ["255", "255"]})
    extra = save(tmp_path / "c.gpkg", [box(X0, Y0 - SIDE, X0 + 2 * SIDE, Y0)], **{"class": ["2"]})
    classes = label_tiles(read_labels([extra, path], binary, CRS), tiles(2, 1), TILE_PX).classes
    assert (classes == 1).all()  # ignored areas say nothing, and erase nothing


def test_raster_of_another_crs_with_ignored_values(tmp_path):
    values = np.ones((40, 40), np.uint8)
    values[:, 20:] = 2
    values[:5] = 255
    west, _, _, north = shapely.bounds(
        reproject(np.array([box(X0 - 9, Y0 - 99, X0 + 99, Y0 + 9)], dtype=object), CRS, WGS84)[0]
    )
    path = tmp_path / "labels.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=40, height=40, count=1, dtype="uint8", crs=WGS84,
        transform=Affine(2e-5, 0, west, 0, -2e-5, north),
    ) as target:  # fmt: skip
        target.write(values, 1)
    found = label_tiles(read_labels([path], task(), CRS), tiles(3, 2), TILE_PX)
    assert set(np.unique(found.classes)) == {0, 1, IGNORE}
    assert (found.classes == 0).any()


def test_fine_raster_labels_give_the_most_frequent_class(tmp_path):
    fine = np.ones((64, 64), np.uint8)
    fine[1::4, 1::4] = 2  # one of sixteen fine pixels in each of ours
    path = tmp_path / "fine.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint8", crs=CRS,
        transform=Affine(0.5, 0, X0, 0, -0.5, Y0),
    ) as target:  # fmt: skip
        target.write(fine, 1)
    found = label_tiles(read_labels([path], task(), CRS), tiles(1, 1), TILE_PX)
    assert (found.classes == 0).all()


def test_points_and_csv(tmp_path):
    lon, lat = reproject(np.array([Point(X0 + 9, Y0 - 9)], dtype=object), CRS, WGS84)[0].coords[0]
    path = tmp_path / "points.csv"
    path.write_text(f"lon,lat,class\n{lon},{lat},green\n")
    one = label_tiles(read_labels([path], task(), CRS), tiles(2, 1), TILE_PX).classes
    assert (one != IGNORE).sum() == 1
    assert one[0, 4, 4] == 1
    wide = label_tiles(read_labels([path], task(point_radius_m=4.5), CRS), tiles(2, 1), TILE_PX).classes
    assert (wide == 1).sum() > 10


def test_overlapping_tiles_see_the_same_labels(tmp_path):
    path = save(tmp_path / "a.gpkg", [box(X0 + 8, Y0 - 30, X0 + 40, Y0 - 2)], **{"class": ["water"]})
    starts = X0 + np.arange(4) * SIDE / 2
    bounds = np.column_stack([starts, np.full(4, Y0 - SIDE), starts + SIDE, np.full(4, Y0)])
    found = label_tiles(read_labels([path], task(), CRS), bounds, TILE_PX)
    assert (found.classes[0][:, 8:] == found.classes[1][:, :8]).all()


def test_sums_are_shared_by_area_and_means_weighted_by_it(tmp_path):
    shapes = [box(X0, Y0 - SIDE, X0 + 2 * SIDE, Y0), box(X0 + 2 * SIDE, Y0 - SIDE, X0 + 2.25 * SIDE, Y0)]
    path = save(tmp_path / "v.gpkg", shapes, v=[10.0, 7.0])
    totals = label_tiles(read_labels([path], regression(aggregate="sum"), CRS), tiles(3, 1), TILE_PX)
    assert totals.tiles.tolist() == [0, 1]  # a quarter of the third tile is too little
    assert totals.values == pytest.approx([5, 5])
    means = label_tiles(read_labels([path], regression(), CRS), tiles(3, 1), TILE_PX)
    assert means.values == pytest.approx([10, 10])


def test_cells_of_a_raster_keep_their_total(tmp_path):
    cells = np.arange(1, 5, dtype=np.float32).reshape(2, 2)
    path = tmp_path / "cells.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=2, height=2, count=1, dtype="float32", crs=CRS, nodata=-1,
        transform=Affine(2 * SIDE, 0, X0, 0, -2 * SIDE, Y0),
    ) as target:  # fmt: skip
        target.write(cells, 1)
    found = label_tiles(read_labels([path], regression(aggregate="sum"), CRS), tiles(4, 4), TILE_PX)
    assert len(found) == 16
    assert found.values.sum() == pytest.approx(cells.sum())


def test_wrong_labels_are_answered_in_a_sentence(tmp_path):
    unknown = save(tmp_path / "u.gpkg", [box(X0, Y0 - 9, X0 + 9, Y0)], **{"class": ["lava"]})
    with pytest.raises(UsageError, match=r"lava.*water \(1\), green \(2\)"):
        read_labels([unknown], task(), CRS)
    with pytest.raises(UsageError, match="no attribute 'class': it has kind"):
        read_labels([save(tmp_path / "k.gpkg", [box(0, 0, 1, 1)], kind=["x"])], task(), CRS)
    with pytest.raises(MissingError, match="no label file"):
        read_labels([tmp_path / "none.gpkg"], task(), CRS)
    far = save(tmp_path / "far.gpkg", [box(X0 + 9e4, Y0, X0 + 9e4 + 9, Y0 + 9)], **{"class": ["water"]})
    with pytest.raises(MissingError, match="do not overlap the tiles"):
        label_tiles(read_labels([far], task(), CRS), tiles(2, 2), TILE_PX)
    broken = tmp_path / "broken.gpkg"
    broken.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        read_labels([broken], task(), CRS)
    bare = tmp_path / "bare.tif"
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        rasterio.open(bare, "w", driver="GTiff", width=2, height=2, count=1, dtype="uint8") as target,
    ):
        target.write(np.ones((1, 2, 2), np.uint8))
    with (
        pytest.warns(rasterio.errors.NotGeoreferencedWarning),
        pytest.raises(FormatError, match="has no CRS"),
    ):
        read_labels([bare], task(), CRS)


def test_of_several_layers_none_is_chosen_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "labels.gpkg"
    for layer in ("west", "east"):
        geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:4326").to_file(path, layer=layer)
    with pytest.raises(FormatError, match="several layers: west, east"):
        read_frame(path)
