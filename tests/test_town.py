"""The demo town: three files that agree about where it is and what is in it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import osmium
import pytest
import rasterio
import shapely

from rsosm_cli.geometry import WGS84, Grid, reproject
from rsosm_cli.town.layout import USES
from rsosm_cli.town.make import CRS, GSD_M, NAMES, TILE_M, Town, make_town


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Town:
    return make_town(tmp_path_factory.mktemp("town"), seed=3, tiles=6)


def boundary(town: Town) -> shapely.Geometry:
    areas = osmium.FileProcessor(str(town.osm)).with_areas().with_filter(osmium.filter.GeoInterfaceFilter())
    found = []
    for o in areas:  # an object of osmium lives as long as its turn of the loop
        if o.is_area() and o.tags.get("boundary") == "administrative":
            assert all(o.tags.get(key) == value for key, value in NAMES.items())
            found.append(shapely.from_geojson(json.dumps(o.__geo_interface__["geometry"])))
    assert len(found) == 1
    return found[0]


def test_boundary_is_a_whole_relation_that_covers_the_tiles(town: Town) -> None:
    grid = Grid.covering(boundary(town), tile_px=224, stride_px=224, gsd_m=GSD_M)
    assert grid.projection.crs == CRS
    assert len(grid) == 36


def test_osm_has_every_kind_and_holes(town: Town) -> None:
    kinds: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    for o in osmium.FileProcessor(str(town.osm)).with_areas():
        kinds[o.type_str()] += bool(len(o.tags))
        keys.update(tag.k for tag in o.tags)
        if o.is_area() and not o.from_way():
            kinds["hole"] += sum(1 for ring in o.outer_rings() for _ in o.inner_rings(ring))
    assert min(kinds[k] for k in ("n", "w", "a", "r", "hole")) > 0
    assert {"highway", "building", "landuse", "natural", "waterway", "railway", "name"} <= set(keys)


def test_streets_share_their_junctions(town: Town) -> None:
    uses: Counter[int] = Counter()
    for o in osmium.FileProcessor(str(town.osm)):
        if o.is_way() and "highway" in o.tags:
            uses.update({n.ref for n in o.nodes})
    assert sum(n >= 3 for n in uses.values()) > 10


def test_picture_lies_on_the_lattice_and_covers_the_boundary(town: Town) -> None:
    with rasterio.open(town.imagery) as raster:
        assert (raster.count, raster.dtypes[0], raster.crs.to_string()) == (3, "uint8", CRS)
        assert raster.res == (GSD_M, GSD_M)
        assert raster.bounds.left / TILE_M == pytest.approx(round(raster.bounds.left / TILE_M), abs=1e-9)
        local = reproject(np.array([boundary(town)], dtype=object), WGS84, CRS)[0]
        assert shapely.box(*raster.bounds).contains(local)
        picture = raster.read()
    assert picture.std() > 20
    assert np.unique(picture[0]).size > 200


def test_labels_cover_the_ground_and_agree_with_the_water_of_the_map(town: Town) -> None:
    data = json.loads(town.labels.read_text())
    shapes = reproject(
        np.array([shapely.from_geojson(json.dumps(f["geometry"])) for f in data["features"]]), WGS84, CRS
    )
    uses = np.array([f["properties"]["class"] for f in data["features"]])
    assert set(uses) <= set(USES)
    assert {"residential", "green", "water"} <= set(uses)
    assert shapely.is_valid(shapes).all()
    whole = (6 * TILE_M) ** 2
    union = shapely.union_all(shapes).area
    assert 0.75 * whole < union <= whole
    assert shapely.area(shapes).sum() == pytest.approx(union, rel=1e-3)  # no ground has two labels
    with rasterio.open(town.imagery) as raster:
        pixels = np.array(list(raster.sample([(p.x, p.y) for p in shapely.point_on_surface(shapes[uses == "water"])])))
    assert (pixels[:, 2] > pixels[:, 0]).all()  # water is blue


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    first, again, other = (make_town(tmp_path / n, seed=s, tiles=3) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    for name in ("osm", "imagery", "labels"):
        read = [getattr(t, name).read_bytes() for t in (first, again, other)]
        assert read[0] == read[1] != read[2]
