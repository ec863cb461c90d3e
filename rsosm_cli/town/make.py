"""Makes the demo town: an OSM file, a picture from above, and labels of its land use, without a network.

The town is drawn so that neither source has the whole answer. Fields, forests and water show in the picture; whether
a closed row of houses holds flats or offices, or a big flat roof a market or a factory, only OpenStreetMap can tell,
and it is incomplete there too.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely
from shapely import Polygon

from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.town.layout import Layout, plan
from rsosm_cli.town.objects import furnish, parts
from rsosm_cli.town.osmfile import write_osm
from rsosm_cli.town.paint import paint
from rsosm_cli.town.tagging import Feature, tag
from rsosm_cli.workspace import atomic, write_text

NAME = "Rosmere"
CRS = "EPSG:32626"  # open ocean north of the Azores: the town can be taken for no real one
GSD_M = 0.6
TILE_M = 134.4  # a tile of 224 pixels
# A corner of the lattice of tiles, so that the town is a whole number of them.
_ORIGIN_M = (3700 * TILE_M, 35500 * TILE_M)

NAMES = {
    "name": NAME,
    "name:en": "Rosmere Town",
    "name:el": "Ρόσμερ",
    "name:zh": "罗斯米尔",
    "alt_name": "Ros-on-Mere",
}


@dataclass(frozen=True)
class Town:
    """The files of the town; ``labels`` are polygons with an attribute ``class``."""

    name: str
    osm: Path
    imagery: Path
    labels: Path

    @classmethod
    def at(cls, folder: Path) -> Town:
        """Return the town whose files lie in ``folder``."""
        return cls(NAME, folder / "town.osm.pbf", folder / "town.tif", folder / "landuse.geojson")


def make_town(folder: Path, *, seed: int = 0, tiles: int = 16) -> Town:
    """Make a square town of ``tiles`` x ``tiles`` tiles (134.4 m each) in ``folder`` and return its files."""
    rng = np.random.default_rng(seed)
    size_m = tiles * TILE_M
    layout = plan(rng, size_m)
    objects = furnish(rng, layout)
    town = Town.at(folder)
    _write_osm(town.osm, layout, tag(rng, layout, objects), rng)
    _write_labels(town.labels, layout)
    _write_picture(town.imagery, paint(rng, layout, objects, GSD_M), size_m)
    return town


def _to_wgs84(geometries: list[shapely.Geometry]) -> np.ndarray:
    """Return geometries in degrees, from metres of the town."""
    local = np.array(geometries, dtype=object)
    return reproject(shapely.transform(local, lambda xy: xy + _ORIGIN_M), CRS, WGS84)


def _boundary(rng: np.random.Generator, size_m: float) -> Polygon:
    """Return the town's limits: the square, pulled in by 6 to 30 m, unevenly."""
    t = np.linspace(0, 1, max(1, round(size_m / 180)) + 1)[:-1]  # corners far enough apart not to cross
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)])
    ring = np.concatenate([a + (b - a) * t[:, None] for a, b in itertools.pairwise(corners)]) * size_m
    inward = np.clip(size_m / 2 - ring, -1, 1)
    return Polygon(ring + inward * rng.uniform(6, 30, (len(ring), 1)))


def _write_osm(path: Path, layout: Layout, features: list[Feature], rng: np.random.Generator) -> None:
    size = layout.size_m
    place = Feature(shapely.Point(size / 2, size / 2), {"place": "town", "population": "9400", **NAMES})
    features = [*features, place]
    geometries = _to_wgs84([*(f.geometry for f in features), _boundary(rng, size), shapely.box(0, 0, size, size)])
    placed = [Feature(g, f.tags) for g, f in zip(geometries, features, strict=False)]
    tags = {"boundary": "administrative", "admin_level": "8", "population": "9400", **NAMES}
    west, south, east, north = geometries[-1].bounds
    write_osm(path, placed, geometries[-2], tags, (west, south, east, north))


def _write_labels(path: Path, layout: Layout) -> None:
    """Write land use as GeoJSON: ground between the streets, and water; the streets carry no label."""
    ground = [(p, b.use) for b in layout.blocks for p in parts(shapely.difference(b.polygon, layout.streets))]
    water = [(p, "water") for p in (*parts(shapely.difference(layout.river_water, layout.streets)), layout.lake)]
    frame = shapely.box(0, 0, layout.size_m, layout.size_m)
    kept = [(q, use) for p, use in (*ground, *water) for q in parts(shapely.intersection(p, frame)) if q.area > 50]
    shapes = shapely.set_precision(_to_wgs84([p for p, _ in kept]), 1e-7)
    features = [
        {"type": "Feature", "properties": {"class": use}, "geometry": json.loads(shapely.to_geojson(shape))}
        for shape, (_, use) in zip(shapes, kept, strict=True)
    ]
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def _write_picture(path: Path, picture: np.ndarray, size_m: float) -> None:
    import rasterio
    from rasterio.transform import from_origin

    transform = from_origin(_ORIGIN_M[0], _ORIGIN_M[1] + size_m, GSD_M, GSD_M)
    profile = {
        "driver": "GTiff",
        "count": 3,
        "dtype": "uint8",
        "crs": CRS,
        "transform": transform,
        "photometric": "RGB",
    }
    size = {"height": picture.shape[1], "width": picture.shape[2]}
    # Lossless: the noise of the picture is what a sensor's would be, and JPEG's would not be.
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "predictor": 2, "zlevel": 1}
    with atomic(path) as part, rasterio.open(part, "w", **profile, **size, **layout) as raster:
        raster.write(picture)
