"""Buildings and built-up land of OSM: what the statistics of a map are set against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize

from rsosm_cli.osm.elements import KINDS, Elements
from rsosm_cli.products.polygons import Polygons

POLYGON = KINDS.index("polygon")
# Land use that counts as built-up besides the buildings themselves.
BUILT_LANDUSE = frozenset({
    "residential", "commercial", "retail", "industrial", "institutional", "education", "religious", "military",
    "construction", "garages", "depot", "port", "railway",
})  # fmt: skip
BUILT_UP = (
    "OSM buildings and landuse=" + ", ".join(sorted(BUILT_LANDUSE)) + "; what OpenStreetMap lacks is lacking here"
)
# Elements are read for squares of this side, so that a city's buildings are never all in memory as geometries.
SQUARE_M = 4000.0

Bounds = tuple[float, float, float, float]
ReadElements = Callable[[Bounds], Elements]


@dataclass(frozen=True)
class Buildings:
    """Buildings of a place, ``B`` of them, each once."""

    inside: NDArray[np.float64]  # (B, 2) a point within the footprint, metres
    area_m2: NDArray[np.float64]  # (B,)

    def __len__(self) -> int:
        return len(self.inside)


def is_building(elements: Elements) -> NDArray[np.bool_]:
    """Return (N,) whether each element is the footprint of a building."""
    tagged = np.array([tags.get("building", "no") != "no" for tags in elements.tags], dtype=bool)
    return tagged & (elements.kind == POLYGON)


def built_up(elements: Elements) -> NDArray[np.object_]:
    """Return the polygons of built-up land: buildings and the land use of ``BUILT_LANDUSE``."""
    landuse = np.array([tags.get("landuse") in BUILT_LANDUSE for tags in elements.tags], dtype=bool)
    return elements.geometry[is_building(elements) | (landuse & (elements.kind == POLYGON))]


def read_buildings(read: ReadElements, bounds: Bounds) -> Buildings:
    """Return the buildings whose inner point lies in ``bounds`` (metres), square by square."""
    points, areas = [np.zeros((0, 2))], [np.zeros(0)]
    for west, south, east, north in squares(bounds):
        elements = read((west, south, east, north))
        footprints = elements.geometry[is_building(elements)]
        xy = shapely.get_coordinates(shapely.point_on_surface(footprints))
        # A footprint that two squares meet is counted in the one that holds its point.
        mine = (xy[:, 0] >= west) & (xy[:, 0] < east) & (xy[:, 1] >= south) & (xy[:, 1] < north)
        points.append(xy[mine])
        areas.append(shapely.area(footprints[mine]))
    return Buildings(np.concatenate(points), np.concatenate(areas))


def squares(bounds: Bounds) -> Iterator[Bounds]:
    """Yield ``bounds`` cut into squares of at most ``SQUARE_M``."""
    west, south, east, north = bounds
    for y in np.arange(south, north, SQUARE_M).tolist():
        for x in np.arange(west, east, SQUARE_M).tolist():
            yield x, y, min(x + SQUARE_M, east), min(y + SQUARE_M, north)


def count_buildings(polygons: Polygons, buildings: Buildings) -> dict[str, NDArray[np.generic]]:
    """Return columns for polygons: ``buildings``, ``buildings_per_ha`` and ``footprint_share`` of the area, 0..1."""
    count: NDArray[Any] = np.zeros(len(polygons))
    footprint: NDArray[Any] = np.zeros(len(polygons))
    if len(polygons) and len(buildings):
        tree = shapely.STRtree(polygons.geometry)
        building, polygon = tree.query(shapely.points(buildings.inside), predicate="within")
        count = np.bincount(polygon, minlength=len(polygons)).astype(float)
        footprint = np.bincount(polygon, buildings.area_m2[building], len(polygons))
    hectares = np.maximum(polygons.area_m2, 1e-9) / 1e4
    return {
        "buildings": count.astype(np.int64),
        "buildings_per_ha": (count / hectares).round(3),
        "footprint_share": np.minimum(footprint / (hectares * 1e4), 1).round(4),
    }


def rasterised(geometry: NDArray[np.object_], shape: tuple[int, int], transform: rasterio.Affine) -> NDArray[np.bool_]:
    """Return (H, W) bool: the pixel's centre lies in one of the polygons."""
    if not len(geometry):
        return np.zeros(shape, bool)
    return np.asarray(
        rasterize(geometry, out_shape=shape, transform=transform, fill=0, default_value=1, dtype="uint8"), dtype=bool
    )
