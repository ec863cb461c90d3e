"""The plan of the demo town: streets, blocks, water, railway, and what each block is used for.

All coordinates are metres from the south-west corner of a square of side ``size_m``, x east, y north.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import shapely
from numpy.random import Generator
from shapely import LineString, Point, Polygon
from shapely.ops import polygonize, unary_union

Use = Literal["residential", "commercial", "industrial", "green", "farmland", "water"]
K = TypeVar("K")
USES: tuple[Use, ...] = ("residential", "commercial", "industrial", "green", "farmland", "water")

# Full width of the carriageway in metres, by value of `highway`.
ROAD_WIDTHS = {"primary": 13.0, "secondary": 10.0, "residential": 6.5, "service": 4.0, "track": 3.0, "footway": 2.0}
# How far the mappers came: everything, the outlines of buildings alone, or nothing between the streets.
Mapped = Literal["full", "buildings", "streets"]
_MAPPED: dict[Mapped, float] = {"full": 0.52, "buildings": 0.26, "streets": 0.22}
_STEP_M = 104.0  # mean side of a block in town
_RAIL_HALF_M = 5.0


@dataclass(frozen=True)
class Road:
    line: LineString
    highway: str
    number: int  # of the street that the piece belongs to: its name
    bridge: bool = False


@dataclass(frozen=True)
class Block:
    """Ground between streets. ``look`` is what a camera sees, ``use`` what it is; they do not always agree."""

    polygon: Polygon
    use: Use
    look: str
    mapped: Mapped


@dataclass
class Layout:
    size_m: float
    roads: list[Road]
    blocks: list[Block]
    river: LineString
    river_water: Polygon
    lake: Polygon  # with the island as its hole
    rail: LineString
    streets: shapely.Geometry = field(default_factory=Polygon)  # the surface of all roads


def plan(rng: Generator, size_m: float) -> Layout:
    """Return the plan of a town on a square of ``size_m`` metres."""
    centre = size_m * rng.uniform(0.44, 0.56, 2)
    river = _river(rng, size_m)
    river_water = river.buffer(rng.uniform(11, 15))
    lake = _lake(rng, size_m, centre)
    rail = _railway(rng, size_m)
    water = unary_union([river_water, lake, Polygon(lake.interiors[0])])
    roads = _streets(rng, size_m, centre, river_water, Polygon(lake.exterior))
    streets = unary_union([r.line.buffer(ROAD_WIDTHS[r.highway] / 2, cap_style="flat") for r in roads])
    blocks = _blocks(rng, size_m, centre, roads, unary_union([water, rail.buffer(_RAIL_HALF_M)]), rail)
    return Layout(size_m, roads, blocks, river, river_water, lake, rail, streets)


def _river(rng: Generator, size: float) -> LineString:
    y = np.linspace(-60, size + 60, 90)
    phase = rng.uniform(0, 2 * np.pi, 2)
    x = size * 0.27 + 0.045 * size * np.sin(2 * np.pi * y / (0.9 * size) + phase[0])
    x += 14 * np.sin(2 * np.pi * y / 310 + phase[1])
    return LineString(np.stack([x, y], axis=1))


def _railway(rng: Generator, size: float) -> LineString:
    x = np.linspace(-60, size + 60, 60)
    y = size * 0.2 + 0.07 * size * np.sin(np.pi * x / size + rng.uniform(-0.4, 0.4))
    return LineString(np.stack([x, y], axis=1))


def _lake(rng: Generator, size: float, centre: np.ndarray) -> Polygon:
    at = np.array([0.84, 0.83]) * size
    radius = 0.062 * size
    island = blob(rng, at + 0.25 * radius, 0.22 * radius)
    return Polygon(blob(rng, at, radius, 0.2).exterior, [island.exterior])


def blob(rng: Generator, at: np.ndarray, radius_m: float, rough: float = 0.15) -> Polygon:
    """Return a smooth closed shape round ``at``."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    r = np.full_like(angle, 1.0)
    for k in (2, 3, 5):
        r += rough / k * 1.6 * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    r = radius_m * np.clip(r, 0.4, 1.7)
    return Polygon(np.stack([at[0] + r * np.cos(angle), at[1] + r * np.sin(angle)], axis=1))


def _urbanity(at: np.ndarray, centre: np.ndarray, size: float) -> np.ndarray:
    """Return how urban points (N, 2) are: 1 in the centre, 0 at the edge of town and beyond."""
    reach = np.linalg.norm((at - centre) * [1.0, 1.1], axis=1) / (0.5 * size)
    angle = np.arctan2(at[:, 1] - centre[1], at[:, 0] - centre[0])
    return np.clip(1 - reach / (0.92 + 0.12 * np.sin(3 * angle + 1)), 0, 1)


def _streets(rng: Generator, size: float, centre: np.ndarray, river: Polygon, lake: Polygon) -> list[Road]:
    """Return streets: a warped grid whose lines thin out towards the fields."""
    lines = [np.cumsum(rng.uniform(0.78, 1.22, int(size / _STEP_M) + 6) * _STEP_M) - 3 * _STEP_M for _ in range(2)]
    waves = rng.normal(0, 1, (3, 2)) * 2 * np.pi / (0.7 * size), rng.uniform(0, 6.28, 3), rng.normal(0, 18, (3, 2))

    def warp(xy: np.ndarray) -> np.ndarray:
        return xy + np.sin(xy @ waves[0].T + waves[1]) @ waves[2]

    main = [int(np.argmin(np.abs(axis - c))) for axis, c in zip(lines, centre, strict=True)]
    frame = shapely.box(0, 0, size, size)
    shore = river.buffer(5)
    roads = []
    for axis in (0, 1):  # 0: streets that run north at a fixed x; 1: streets that run east at a fixed y
        along, across = lines[1 - axis], lines[axis]
        for i, fixed in enumerate(across):
            for j in range(len(along) - 1):
                run = np.linspace(along[j], along[j + 1], 5)
                still = np.full(5, fixed)
                xy = warp(np.stack([still, run] if axis == 0 else [run, still], axis=1))
                line = LineString(xy)
                if not frame.intersects(line):
                    continue
                rank = abs(i - main[axis])
                urban = float(_urbanity(xy[2:3], centre, size)[0])
                wet = shore.intersects(line)
                if lake.distance(line) < 12:
                    continue
                if rank == 0:
                    highway = "primary"
                elif rank % 4 == 0:
                    highway = "secondary"
                elif wet or (urban < 0.12 and rank % 2) or rng.random() < (0.05 if urban > 0.12 else 0.2):
                    continue
                else:
                    highway = "residential" if urban > 0.14 else "track"
                if wet and shapely.intersection(line, river).length > 70:
                    continue  # along the shore, not across it
                line = shapely.intersection(line, frame)
                if isinstance(line, LineString) and line.length > 1:
                    roads.append(Road(line, highway, 100 * axis + i, wet))
    return _without_stubs(roads, shore)


def _without_stubs(roads: list[Road], river: shapely.Geometry) -> list[Road]:
    """Return the roads but those that end in the river."""
    while True:
        ends = Counter(_end(road, i) for road in roads for i in (0, -1))
        kept = [
            road
            for road in roads
            if not any(ends[_end(road, i)] == 1 and river.contains(Point(road.line.coords[i])) for i in (0, -1))
        ]
        if len(kept) == len(roads):
            return roads
        roads = kept


def _end(road: Road, i: int) -> tuple[float, float]:
    x, y = road.line.coords[i]
    return round(x, 3), round(y, 3)


def _blocks(
    rng: Generator, size: float, centre: np.ndarray, roads: list[Road], cut: shapely.Geometry, rail: LineString
) -> list[Block]:
    frame = shapely.box(0, 0, size, size)
    cells = list(polygonize(unary_union([*(r.line for r in roads), frame.exterior])))
    cells.sort(key=lambda c: (round(c.centroid.y, 3), round(c.centroid.x, 3)))
    blocks = []
    for cell in cells:
        for piece in getattr(cell.difference(cut), "geoms", [cell.difference(cut)]):
            if not isinstance(piece, Polygon) or piece.area < 400:
                continue
            at = np.array([[piece.centroid.x, piece.centroid.y]])
            urban = float(_urbanity(at, centre, size)[0])
            use = _use(rng, urban, piece, rail)
            mapped = _draw(rng, _MAPPED)
            blocks.append(Block(piece, use, _look(rng, use, urban, piece.area), mapped))
    return blocks


def _use(rng: Generator, urban: float, piece: Polygon, rail: LineString) -> Use:
    if piece.area < 2500:
        return "green"
    if urban < 0.14:
        return "farmland" if rng.random() < 0.68 else "green"
    if piece.distance(rail) < 130 and 0.14 < urban < 0.62 and rng.random() < 0.8:
        return "industrial"
    shares: dict[Use, float] = {
        "residential": 0.66,
        "commercial": 0.1,
        "industrial": 0.06,
        "green": 0.14,
        "farmland": 0.04,
    }
    if urban > 0.66:
        shares = {"residential": 0.3, "commercial": 0.58, "green": 0.12}
    return _draw(rng, shares)


def _look(rng: Generator, use: Use, urban: float, area: float) -> str:
    """Return a look. Some are shared between uses: there the image alone cannot tell, and OSM sometimes can."""
    small = area < 9000
    looks: dict[str, dict[str, float]] = {
        "residential": {"perimeter": 0.75, "slabs": 0.2, "houses": 0.05}
        if urban > 0.66
        else {"houses": 0.62, "slabs": 0.24, "perimeter": 0.14},
        "commercial": {"perimeter": 0.45, "bigbox": 0.55},
        "industrial": {"halls": 0.78, "bigbox": 0.22},
        "green": {"park": 0.4, "forest": 0.3, "pitch": 0.15, "meadow": 0.15}
        if urban > 0.14
        else {"forest": 0.7, "meadow": 0.3},
        "farmland": {"fields": 0.72, "orchard": 0.14, "meadow": 0.14},
        "water": {"water": 1.0},
    }
    if use == "green" and small:
        looks["green"] = {"park": 0.7, "forest": 0.3}
    if area > 17000:  # too wide for one ring of houses
        looks["residential"] = {"houses": 0.65, "slabs": 0.35}
        looks["commercial"] = {"bigbox": 1.0}
    return _draw(rng, looks[use])


def _draw(rng: Generator, shares: Mapping[K, float]) -> K:
    """Return one of the keys, drawn by its share."""
    keys = list(shares)
    return keys[int(rng.choice(len(keys), p=list(shares.values())))]
