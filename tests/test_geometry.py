"""Where: the lattice of pixels, the grid of tiles, zones."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from shapely import Point, Polygon

from rsosm_cli.errors import UsageError
from rsosm_cli.geometry import WGS84, Grid, PixelBounds, Projection, reproject, utm_crs

PLACE = Polygon([(9.47, 47.05), (9.56, 47.06), (9.63, 47.2), (9.52, 47.26)])
RING = Point(11.0, 46.0).buffer(0.03).difference(Point(11.0, 46.0).buffer(0.02))
boxes = st.tuples(*[st.floats(-5e5, 5e5) for _ in range(2)], *[st.floats(0.01, 1e4) for _ in range(2)])


@given(boxes, st.floats(0.05, 30))
def test_pixels_around_a_box_are_the_fewest_that_hold_it(box: tuple[float, ...], gsd: float) -> None:
    west, south, width, height = box
    east, north = west + width, south + height
    projection = Projection("EPSG:32632", gsd)
    px = projection.pixels_around(west, south, east, north)
    got = projection.bounds_of(px)
    slack = 1e-9 * max(map(abs, (west, south, east, north))) + 1e-9
    assert got[0] <= west + slack
    assert got[1] <= south + slack
    assert got[2] >= east - slack
    assert got[3] >= north - slack
    assert got[2] - got[0] < width + 2 * gsd + slack
    assert got[3] - got[1] < height + 2 * gsd + slack


def test_the_transform_agrees_with_the_bounds() -> None:
    projection = Projection("EPSG:32632", 0.6)
    px = PixelBounds(100, -50, 324, 174)
    transform = projection.transform_of(px)
    west, south, east, north = projection.bounds_of(px)
    assert (transform.c, transform.f) == pytest.approx((west, north))
    assert transform.c + transform.a * px.width == pytest.approx(east)
    assert transform.f + transform.e * px.height == pytest.approx(south)


def test_intersection_and_padding() -> None:
    a, b = PixelBounds(0, 0, 10, 10), PixelBounds(5, 8, 20, 20)
    assert a.intersection(b) == PixelBounds(5, 8, 10, 10)
    assert a.intersection(PixelBounds(10, 0, 20, 10)).empty
    assert a.padded(2) == PixelBounds(-2, -2, 12, 12)


@pytest.mark.parametrize("place", [PLACE, RING], ids=["plain", "ring"])
@pytest.mark.parametrize("stride", [224, 112, 300])
def test_the_grid_has_exactly_the_tiles_that_share_area_with_the_place(place: Polygon, stride: int) -> None:
    grid = Grid.covering(place, tile_px=224, stride_px=stride, gsd_m=2.5)
    local = reproject(np.array([place], dtype=object), WGS84, grid.projection.crs)[0]
    tiles = shapely.box(*grid.bounds_m().T)
    assert (shapely.area(shapely.intersection(tiles, local)) > 0).all()
    assert len(np.unique(grid.cells, axis=0)) == len(grid)
    order = np.lexsort((grid.cells[:, 0], grid.cells[:, 1]))
    assert (order == np.arange(len(grid))).all()
    # None of the neighbours left out shares area with it.
    have = {tuple(c) for c in grid.cells.tolist()}
    around = {(c + i, r + j) for c, r in have for i in (-1, 0, 1) for j in (-1, 0, 1)} - have
    start = np.array(sorted(around)) * stride
    px = np.concatenate([start, start + 224], axis=1)
    out = shapely.box(px[:, 0] * 2.5, -px[:, 3] * 2.5, px[:, 2] * 2.5, -px[:, 1] * 2.5)
    assert (shapely.area(shapely.intersection(out, local)) == 0).all()
    if stride <= 224:
        assert shapely.union_all(tiles).buffer(1e-6).covers(local)


def test_two_cities_of_one_zone_share_the_lattice() -> None:
    first = Grid.covering(Point(9.1, 47.1).buffer(0.005), tile_px=224, stride_px=224, gsd_m=0.6)
    second = Grid.covering(Point(9.3, 47.2).buffer(0.005), tile_px=224, stride_px=224, gsd_m=0.6)
    assert first.projection == second.projection
    assert (first.bounds_px() % 224 == 0).all()
    assert (second.bounds_px() % 224 == 0).all()


def test_a_tile_side_in_metres_is_pixels_times_gsd() -> None:
    grid = Grid.covering(PLACE, tile_px=224, stride_px=224, gsd_m=0.6)
    west, south, east, north = grid.bounds_m().T
    np.testing.assert_allclose(east - west, 134.4)
    np.testing.assert_allclose(north - south, 134.4)


@pytest.mark.parametrize(
    ("lon", "lat", "crs"),
    [(9.5, 47.1, "EPSG:32632"), (-70.6, -33.4, "EPSG:32719"), (180.0, 10, "EPSG:32660"), (-180.0, 0, "EPSG:32601")],
)
def test_the_zone_is_that_of_the_centroid(lon: float, lat: float, crs: str) -> None:
    assert utm_crs(Point(lon, lat).buffer(0.01).intersection(shapely.box(-180, -90, 180, 90))) == crs


def test_a_place_across_zones_keeps_one() -> None:
    across = shapely.box(11.9, 47.0, 12.05, 47.05)
    grid = Grid.covering(across, tile_px=224, stride_px=224, gsd_m=5)
    assert grid.projection.crs == "EPSG:32632"
    local = reproject(np.array([across], dtype=object), WGS84, grid.projection.crs)[0]
    assert shapely.union_all(shapely.box(*grid.bounds_m().T)).covers(local)


def test_the_poles_are_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="latitude 86"):
        utm_crs(Point(0, 86))


def test_reprojection_there_and_back_keeps_the_place() -> None:
    array = np.array([PLACE, Point(9.5, 47.1)], dtype=object)
    there = reproject(array, WGS84, "EPSG:32632")
    back = reproject(there, "EPSG:32632", WGS84)
    assert shapely.equals_exact(array, back, tolerance=1e-8).all()
    assert reproject(array, WGS84, "OGC:CRS84") is array  # the same CRS but for the order of its axes
