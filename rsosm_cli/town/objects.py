"""What stands on the blocks of the demo town: surfaces, buildings, trees, cars."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import shapely
from numpy.random import Generator
from shapely import LineString, MultiPolygon, Polygon
from shapely.affinity import rotate, translate

from rsosm_cli.town.layout import ROAD_WIDTHS, Block, Layout, blob

RGB = tuple[int, int, int]
Roof = Literal["gable", "flat", "metal", "round"]
_TILES: tuple[RGB, ...] = (
    (168, 92, 68),
    (150, 80, 62),
    (182, 110, 82),
    (128, 84, 72),
    (112, 104, 100),
    (140, 126, 116),
)
_FLATS: tuple[RGB, ...] = ((170, 168, 164), (146, 146, 148), (190, 186, 178), (158, 150, 142), (122, 124, 128))
_METALS: tuple[RGB, ...] = ((176, 190, 200), (200, 204, 206), (132, 158, 178), (186, 176, 160), (150, 96, 84))
_CARS: tuple[RGB, ...] = ((232, 232, 232), (40, 42, 46), (150, 152, 156), (150, 40, 40), (52, 74, 120), (196, 190, 178))


@dataclass(frozen=True)
class Surface:
    """Ground of one kind. ``angle``: direction of rows in radians; ``tone`` shifts its colour, about -1..1."""

    polygon: Polygon
    kind: str
    angle: float = 0.0
    tone: float = 0.0


@dataclass(frozen=True)
class Building:
    polygon: Polygon  # without the courtyard
    height_m: float
    roof: Roof
    colour: RGB
    block: int


@dataclass
class Objects:
    surfaces: list[tuple[int, Surface]] = field(default_factory=list)  # (block, surface), painted in this order
    buildings: list[Building] = field(default_factory=list)
    trees: list[tuple[float, float, float]] = field(default_factory=list)  # x, y, radius in metres
    forests: list[tuple[Polygon, float]] = field(default_factory=list)  # ground to be covered, trees a square metre
    cars: list[tuple[Polygon, RGB]] = field(default_factory=list)
    marks: list[tuple[LineString, float]] = field(default_factory=list)  # white lines and their width in metres
    paths: list[tuple[int, LineString]] = field(default_factory=list)


def furnish(rng: Generator, layout: Layout) -> Objects:
    """Return the objects on all blocks of a layout."""
    made = Objects()
    for number, block in enumerate(layout.blocks):
        ground = shapely.difference(block.polygon, layout.streets)
        for part in parts(ground):
            if part.area > 150:
                _LOOKS[block.look](rng, made, number, part)
    _street_trees(rng, layout, made)
    _traffic(rng, layout, made)
    return made


def parts(geometry: shapely.Geometry) -> list[Polygon]:
    """Return the polygons of a geometry."""
    if isinstance(geometry, Polygon):
        return [] if geometry.is_empty else [geometry]
    return [p for p in getattr(geometry, "geoms", []) if isinstance(p, Polygon) and not p.is_empty]


def _pick(rng: Generator, colours: tuple[RGB, ...]) -> RGB:
    base = np.array(colours[rng.integers(len(colours))]) + rng.normal(0, 2.5, 3) + rng.normal(0, 8)
    r, g, b = np.clip(base, 20, 245).astype(int).tolist()
    return r, g, b


def _rectangle(x: float, y: float, width: float, depth: float, angle: float) -> Polygon:
    """Return a rectangle centred at (x, y), its width along ``angle`` (radians)."""
    return rotate(shapely.box(x - width / 2, y - depth / 2, x + width / 2, y + depth / 2), angle, use_radians=True)


def _axis(ground: Polygon) -> float:
    """Return the direction of the long side of the smallest box round a block, in radians."""
    corners = np.array(shapely.minimum_rotated_rectangle(ground).exterior.coords)
    sides = np.diff(corners[:3], axis=0)
    side = sides[np.argmax(np.linalg.norm(sides, axis=1))]
    return float(np.arctan2(side[1], side[0]))


def _along(ring: shapely.Geometry, step: float, rng: Generator) -> Iterator[tuple[float, float, float]]:
    """Yield x, y and direction of places about ``step`` metres apart along a ring."""
    at = rng.uniform(0, step)
    while at < ring.length - step * 0.4:
        a, b = ring.interpolate(at - 1), ring.interpolate(at + 1)
        middle = ring.interpolate(at)
        yield middle.x, middle.y, float(np.arctan2(b.y - a.y, b.x - a.x))
        at += step * rng.uniform(0.85, 1.2)


def _scatter(rng: Generator, ground: shapely.Geometry, per_m2: float, radius: tuple[float, float]) -> np.ndarray:
    """Return trees (n, 3) scattered over ground: x, y, radius."""
    if ground.is_empty:
        return np.empty((0, 3))
    west, south, east, north = ground.bounds
    count = rng.poisson((east - west) * (north - south) * per_m2)
    xy = rng.uniform((west, south), (east, north), (count, 2))
    kept = xy[shapely.contains_xy(ground, xy)]
    return np.column_stack([kept, rng.uniform(*radius, len(kept))])


def _plant(rng: Generator, made: Objects, ground: shapely.Geometry, per_m2: float, radius: tuple[float, float]) -> None:
    made.trees += [tuple(t) for t in _scatter(rng, ground, per_m2, radius).tolist()]


def _free(ground: Polygon, made: Objects, since: int, gap: float) -> shapely.Geometry:
    """Return ``ground`` without the buildings made since a number, kept ``gap`` metres away."""
    built = [b.polygon for b in made.buildings[since:]]
    return shapely.difference(ground, shapely.union_all(built).buffer(gap)) if built else ground


def _houses(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "lawn", tone=rng.normal(0, 0.5))))
    first = len(made.buildings)
    taken: list[Polygon] = []
    for inset in (11.0, 33.0):
        for core in parts(ground.buffer(-inset)):
            for x, y, angle in _along(core.exterior, 18.5, rng):
                width, depth = rng.uniform(9, 13.5), rng.uniform(7.5, 9.5)
                house = _rectangle(x, y, width, depth, angle)
                if rng.random() < 0.25:  # an L
                    wing = _rectangle(
                        x + np.cos(angle) * 3 - np.sin(angle) * 4,
                        y + np.sin(angle) * 3 + np.cos(angle) * 4,
                        6,
                        7,
                        angle,
                    )
                    house = shapely.union(house, wing)
                lot = house.buffer(3)
                if rng.random() < 0.08 or not ground.contains(lot) or any(lot.intersects(t) for t in taken):
                    continue
                taken.append(house)
                made.buildings.append(
                    Building(
                        house, rng.uniform(5, 8), "gable" if rng.random() < 0.9 else "flat", _pick(rng, _TILES), block
                    )
                )
                if rng.random() < 0.09:
                    pool = _rectangle(x + np.sin(angle) * 11, y - np.cos(angle) * 11, 7, 3.6, angle)
                    if ground.buffer(-3).contains(pool) and not any(pool.buffer(2).intersects(t) for t in taken):
                        taken.append(pool)
                        made.surfaces.append((block, Surface(pool, "pool")))
                drive = _rectangle(x - np.sin(angle) * -9, y - np.cos(angle) * 9, 3, 9, angle)
                if rng.random() < 0.6 and not any(drive.intersects(t) for t in taken):
                    made.surfaces.append((block, Surface(drive, "yard", tone=0.3)))
    _plant(rng, made, _free(ground.buffer(-2), made, first, 2.5), 1 / 170, (1.3, 3.4))


def _slabs(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "lawn", tone=rng.normal(-0.2, 0.4))))
    first = len(made.buildings)
    angle = _axis(ground)
    colour = _pick(rng, _FLATS)
    for x, y in _packed(ground, angle, (56, 31), (50, 12.5), 5, rng).tolist():
        slab = _rectangle(x, y, rng.uniform(40, 50), 12.5, angle)
        if rng.random() < 0.95:
            made.buildings.append(Building(slab, rng.uniform(14, 24), "flat", colour, block))
            strip = _rectangle(x - np.sin(angle) * -11, y - np.cos(angle) * 11, 44, 6, angle)
            if ground.contains(strip):
                _parking(rng, made, block, strip, angle, 0.6)
    _plant(rng, made, _free(ground.buffer(-2), made, first, 6), 1 / 210, (2, 4))


def _packed(
    ground: Polygon, angle: float, step: tuple[float, float], size: tuple[float, float], gap: float, rng: Generator
) -> np.ndarray:
    """Return centres (n, 2) of rectangles of ``size`` on the lattice that fits most of them into the ground."""
    inside = ground.buffer(-gap)
    shapely.prepare(inside)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / 2 * size @ turn  # (4, 2)
    best = np.empty((0, 2))
    for _ in range(14):
        at = _rows(inside, angle, *step, rng)
        fits = at[shapely.contains(inside, shapely.polygons(at[:, None] + corners))] if len(at) else at
        if len(fits) > len(best):
            best = fits
    return best


def _rows(ground: shapely.Geometry, angle: float, dx: float, dy: float, rng: Generator) -> np.ndarray:
    """Return the nodes (n, 2) of a lattice turned by ``angle`` that lie on the ground, in rows."""
    if ground.is_empty:
        return np.empty((0, 2))
    west, south, east, north = ground.bounds
    reach = int(np.hypot(east - west, north - south) / min(dx, dy)) + 1
    steps = np.arange(-reach, reach + 1)
    off = rng.uniform(-0.5, 0.5, 2)
    u, v = np.meshgrid((steps + off[0]) * dx, (steps + off[1]) * dy)
    x = (west + east) / 2 + u * np.cos(angle) - v * np.sin(angle)
    y = (south + north) / 2 + u * np.sin(angle) + v * np.cos(angle)
    at = np.stack([x.ravel(), y.ravel()], axis=1)
    return at[shapely.contains_xy(ground, at)]


def _perimeter(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "paving", tone=rng.normal(0, 0.4))))
    outer = ground.buffer(-4.5)
    for core in parts(outer):
        court = core.buffer(-13.5, join_style="mitre")
        if core.area < 500:
            continue
        if court.is_empty:
            made.buildings.append(Building(core, rng.uniform(10, 15), "flat", _pick(rng, _FLATS), block))
            continue
        ring = core.difference(court)
        for yard in parts(court):
            made.surfaces.append(
                (block, Surface(yard, "lawn" if rng.random() < 0.6 else "yard", tone=rng.normal(0, 0.5)))
            )
            _plant(rng, made, yard.buffer(-2.5), 1 / 120, (1.5, 3.2))
        if rng.random() < 0.35 and len(parts(court)) == 1 and isinstance(ring, Polygon):
            made.buildings.append(Building(ring, rng.uniform(13, 18), "flat", _pick(rng, _FLATS + _TILES), block))
            continue
        # Cut the ring into houses by rays from the middle.
        c = core.centroid
        turns = np.sort(rng.uniform(0, 2 * np.pi, max(6, int(core.length / 26))))
        for a, b in zip(turns, np.append(turns[1:], turns[0] + 2 * np.pi), strict=True):
            sweep = np.linspace(a, b, 8)
            fan = Polygon([(c.x, c.y), *zip(c.x + 400 * np.cos(sweep), c.y + 400 * np.sin(sweep), strict=True)])
            for house in parts(ring.intersection(fan.buffer(0))):
                if house.area > 60 and rng.random() > 0.05:
                    roof: Roof = "gable" if rng.random() < 0.35 else "flat"
                    made.buildings.append(
                        Building(house, rng.uniform(11, 19), roof, _pick(rng, _FLATS + _TILES), block)
                    )


def _bigbox(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "asphalt", tone=rng.normal(0.3, 0.3))))
    for verge in parts(ground.difference(ground.buffer(-3.5))):
        made.surfaces.append((block, Surface(verge, "lawn")))
    first = len(made.buildings)
    angle = _axis(ground)
    for width, depth in ((62, 40), (44, 30), (26, 18)):
        at = _packed(ground, angle, (width + 30, depth + 32), (width, depth), 6, rng)
        for x, y in at.tolist():
            hall = _rectangle(x, y, width * rng.uniform(0.85, 1), depth * rng.uniform(0.85, 1), angle)
            made.buildings.append(Building(hall, rng.uniform(7, 11), "flat", _pick(rng, _FLATS[:3]), block))
        if len(at):
            break
    rest = _free(ground.buffer(-4), made, first, 5)
    for x, y in _rows(rest, angle, 36, 17, rng).tolist():
        strip = _rectangle(x, y, 34, 10.5, angle)
        if rest.contains(strip):
            _parking(rng, made, block, strip, angle, 0.55)
    _plant(rng, made, rest.boundary.buffer(1.5).intersection(rest), 1 / 130, (1.3, 2.4))


def _parking(rng: Generator, made: Objects, block: int, strip: Polygon, angle: float, full: float) -> None:
    """Lay one or two rows of bays on a strip and put cars into some."""
    made.surfaces.append((block, Surface(strip, "parking", angle)))
    c = strip.centroid
    sides = np.array(strip.exterior.coords)
    lengths = np.linalg.norm(np.diff(sides[:3], axis=0), axis=1)
    length, depth = lengths.max(), lengths.min()
    across = np.array([-np.sin(angle), np.cos(angle)])
    along = np.array([np.cos(angle), np.sin(angle)])
    for row in (-1, 1) if depth > 9 else (0,):
        for u in np.arange(-length / 2, length / 2 + 0.1, 2.7):
            foot = np.array([c.x, c.y]) + along * u + across * row * depth / 4
            half = across * 2.4
            made.marks.append((LineString([foot - half, foot + half]), 0.25))
            if rng.random() < full and u < length / 2 - 2:
                x, y = foot + along * 1.35
                made.cars.append((_rectangle(x, y, 1.9, 4.3, angle), _pick(rng, _CARS)))


def _halls(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "yard", tone=rng.normal(-0.1, 0.4))))
    first = len(made.buildings)
    angle = _axis(ground)
    colour = _pick(rng, _METALS)
    width, depth = rng.uniform(38, 52), rng.uniform(20, 28)
    for x, y in _packed(ground, angle, (width + 9, depth + 11), (width, depth), 5, rng).tolist():
        hall = _rectangle(x, y, width * rng.uniform(0.85, 1), depth * rng.uniform(0.85, 1), angle)
        if rng.random() < 0.85:
            made.buildings.append(Building(hall, rng.uniform(8, 13), "metal", colour, block))
            colour = _pick(rng, _METALS) if rng.random() < 0.5 else colour
    rest = _free(ground.buffer(-4), made, first, 4)
    for x, y, _ in _scatter(rng, rest, 1 / 1500, (1, 2)):
        tank = shapely.Point(x, y).buffer(rng.uniform(4, 7.5))
        if rest.contains(tank) and rng.random() < 0.7:
            made.buildings.append(Building(tank, 8, "round", _pick(rng, _METALS[:2]), block))
            rest = rest.difference(tank.buffer(3))
    for x, y, _ in _scatter(rng, rest, 1 / 160, (1, 2)):
        box = _rectangle(x, y, 6.1, 2.5, angle + (rng.random() < 0.3) * np.pi / 2)
        if rest.contains(box):
            made.cars.append((box, _pick(rng, (*_METALS, *_CARS))))
    _plant(rng, made, ground.boundary.buffer(3).intersection(ground), 1 / 200, (1.5, 3))


def _park(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "lawn", tone=rng.normal(0.3, 0.3))))
    c = ground.centroid
    pond = blob(rng, np.array([c.x, c.y]) + rng.normal(0, 8, 2), rng.uniform(8, 14))
    wet = ground.area > 7000 and rng.random() < 0.5 and ground.contains(pond.buffer(4))
    if wet:
        made.surfaces.append((block, Surface(pond, "pond")))
    keep = pond.buffer(3) if wet else Polygon()
    corners = np.array(ground.exterior.coords)[:-1]
    for _ in range(3):
        a, b = corners[rng.choice(len(corners), 2, replace=len(corners) < 2)]
        middle = (a + b) / 2 + rng.normal(0, 12, 2)
        path = LineString([a, (a + middle) / 2 + rng.normal(0, 4, 2), middle, (b + middle) / 2, b])
        path = path.intersection(ground).difference(keep)
        for piece in getattr(path, "geoms", [path]):
            if isinstance(piece, LineString) and piece.length > 20:
                made.paths.append((block, piece))
                keep = keep.union(piece.buffer(3))
    _plant(rng, made, ground.buffer(-3).difference(keep), 1 / 130, (2.2, 4.8))


def _forest(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "forest")))
    made.trees += [tuple(t) for t in _scatter(rng, ground.buffer(-1.5), 1 / 14, (1.9, 4.3)).tolist()]


def _pitch(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "lawn", tone=0.2)))
    angle = _axis(ground)
    c = ground.centroid
    for length, width in ((96, 62), (64, 40), (32, 16)):
        field_ = _rectangle(c.x, c.y, length, width, angle)
        if ground.contains(field_.buffer(3)):
            made.surfaces.append((block, Surface(field_, "pitch" if length > 40 else "court", angle)))
            inner = field_.buffer(-2, join_style="mitre")
            ring = np.array(inner.exterior.coords)
            made.marks.append((LineString(ring), 0.5))
            made.marks.append((LineString([(ring[0] + ring[1]) / 2, (ring[2] + ring[3]) / 2]), 0.5))
            made.marks.append((LineString([(ring[1] + ring[2]) / 2, (ring[0] + ring[3]) / 2]), 0.5))
            made.marks.pop(-1 if abs(ring[1] - ring[0]).max() > abs(ring[2] - ring[1]).max() else -2)
            made.marks.append((LineString(shapely.Point(c.x, c.y).buffer(width / 8).exterior.coords), 0.5))
            break
    _plant(rng, made, ground.difference(_rectangle(c.x, c.y, 104, 70, angle)), 1 / 140, (2, 4))


def _meadow(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "meadow", tone=rng.normal(0, 0.5))))
    _plant(rng, made, ground.boundary.buffer(4).intersection(ground), 1 / 90, (1.3, 3.2))
    _plant(rng, made, ground, 1 / 1500, (2, 4))


def _orchard(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    made.surfaces.append((block, Surface(ground, "meadow", tone=0.4)))
    angle = _axis(ground)
    nodes = _rows(ground.buffer(-4), angle, 5.2, 7.5, rng)
    made.trees += [(x, y, r) for (x, y), r in zip(nodes.tolist(), rng.uniform(1.5, 2.0, len(nodes)), strict=True)]


def _fields(rng: Generator, made: Objects, block: int, ground: Polygon) -> None:
    angle = _axis(ground) + rng.choice([0, np.pi / 2])
    c = ground.centroid
    reach = float(np.hypot(*np.ptp(np.array(ground.exterior.coords), axis=0)))
    at = -reach
    while at < reach:
        step = rng.uniform(38, 85)
        band = shapely.box(c.x - reach, c.y + at, c.x + reach, c.y + at + step - 1.5)
        for strip in parts(ground.intersection(rotate(band, angle, (c.x, c.y), use_radians=True))):
            kind = rng.choice(["crop", "wheat", "soil", "rape"], p=[0.4, 0.28, 0.24, 0.08])
            made.surfaces.append((block, Surface(strip, str(kind), angle, rng.normal(0, 0.6))))
        at += step
    _plant(rng, made, ground.boundary.buffer(2).intersection(ground), 1 / 260, (1.3, 3))


def _street_trees(rng: Generator, layout: Layout, made: Objects) -> None:
    for road in layout.roads:
        if road.highway in ("primary", "secondary") and not road.bridge and rng.random() < 0.6:
            for side in (-1, 1):
                row = road.line.offset_curve(side * (ROAD_WIDTHS[road.highway] / 2 + 2.2))
                if isinstance(row, LineString):
                    made.trees += [(x, y, rng.uniform(1.6, 2.6)) for x, y, _ in _along(row, 11, rng)]


def _traffic(rng: Generator, layout: Layout, made: Objects) -> None:
    for road in layout.roads:
        if road.highway == "track":
            continue
        lane = 1.7 if road.highway != "residential" else 2.2
        spacing = {"primary": 38, "secondary": 55, "residential": 26}[road.highway]
        for side in (-1, 1):
            row = road.line.offset_curve(side * lane)
            if isinstance(row, LineString):
                for x, y, angle in _along(row, spacing, rng):
                    if rng.random() < 0.6:
                        made.cars.append((_rectangle(x, y, 4.3, 1.9, angle), _pick(rng, _CARS)))


def shadow_of(polygon: Polygon, dx: float, dy: float) -> shapely.Geometry:
    """Return the ground that a prism over ``polygon`` shades when its top falls at (dx, dy)."""
    steps = [translate(polygon, dx * t, dy * t) for t in np.linspace(0, 1, 5)]
    pairs = [shapely.MultiPolygon([*parts(a), *parts(b)]).convex_hull for a, b in itertools.pairwise(steps)]
    if polygon.interiors or polygon.area < 0.8 * polygon.convex_hull.area:
        return MultiPolygon([p for s in np.linspace(0, 1, 14) for p in parts(translate(polygon, dx * s, dy * s))])
    return shapely.union_all(pairs)


_LOOKS = {
    "houses": _houses,
    "slabs": _slabs,
    "perimeter": _perimeter,
    "bigbox": _bigbox,
    "halls": _halls,
    "park": _park,
    "forest": _forest,
    "pitch": _pitch,
    "meadow": _meadow,
    "orchard": _orchard,
    "fields": _fields,
}

__all__ = ["Block", "Building", "Objects", "Surface", "furnish", "parts", "shadow_of"]
