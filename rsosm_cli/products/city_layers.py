"""What of a city's OSM a picture shows: classes with colours, and as much of them as leaves the image visible."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import Elements, element_groups

Box = tuple[float, float, float, float]  # west, south, east, north in metres of the CRS
Lines = list[NDArray[np.float64]]  # each (n, 2) metres


class Kind(NamedTuple):
    """A class of the legend."""

    name: str
    colour: str
    width: float  # of its lines in a window, in points


# Bright, as they lie on photographs; in the order of drawing, so that buildings lie on top.
KINDS: tuple[Kind, ...] = (
    Kind("other objects", "#d9d4ea", 0.8),
    Kind("green", "#7bf26b", 1.0),
    Kind("water", "#3cc8ff", 1.2),
    Kind("railways", "#ff5fe0", 1.2),
    Kind("roads", "#ff8a3c", 1.2),
    Kind("buildings", "#ffe14d", 1.2),
    Kind("points", "#ffffff", 0.0),
)
_OTHER, _GREEN, _WATER, _RAIL, _ROAD, BUILDING, POINT = range(7)
_NOT_DRAWN = -1


class Layer(NamedTuple):
    """A part of a class that the overview draws whole or not at all."""

    name: str
    kind: int
    most_m: float  # metres a screen pixel up to which single objects of it can be told apart
    least_px: float = 0.0  # smallest box of a polygon, in square screen pixels


# From what makes a place recognisable down to what only blackens it.
LAYERS: tuple[Layer, ...] = (
    Layer("main roads", _ROAD, np.inf),
    Layer("rivers and lakes", _WATER, np.inf, 100),
    Layer("railways", _RAIL, 60),
    Layer("secondary roads", _ROAD, 80),
    Layer("large green", _GREEN, 60, 1600),
    Layer("buildings", BUILDING, 3),
    Layer("tertiary roads", _ROAD, 25),
    Layer("streets", _ROAD, 10),
    Layer("paths", _ROAD, 4),
    Layer("streams", _WATER, 10, 36),
    Layer("other objects", _OTHER, 4, 36),
    Layer("points", POINT, 1.5),
)
_LAYER = {layer.name: i for i, layer in enumerate(LAYERS)}
_ROADS = {
    **dict.fromkeys(("motorway", "trunk", "primary"), "main roads"),
    "secondary": "secondary roads",
    "tertiary": "tertiary roads",
    **dict.fromkeys(("residential", "unclassified", "living_street", "pedestrian", "road"), "streets"),
}
_GREEN_VALUES = {
    "landuse": {
        "forest", "grass", "meadow", "farmland", "orchard", "vineyard", "cemetery", "village_green", "allotments",
        "recreation_ground", "greenfield", "flowerbed", "plant_nursery",
    },
    "leisure": {"park", "garden", "pitch", "golf_course", "nature_reserve", "common", "dog_park", "playground"},
    "natural": {"wood", "scrub", "grassland", "heath", "tree_row", "fell", "shrubbery"},
}  # fmt: skip
# Lines of maps, not of the ground: no photograph shows them.
_INVISIBLE = {"administrative", "statistical", "postal_code", "census", "political", "timezone"}

_GRID = 24  # cells along a side of the overview in which the drawn lines are weighed
# Share of a busy cell (percentile 90) that lines may cover: most of the image stays visible; without one, the lines do.
_MOST_INK, _MOST_INK_ALONE = 0.22, 0.4
_CLOSE_M = 0.8  # metres a screen pixel up to which outlines are single houses, with the image between them
_LINE_PX = 1.1  # width of the overview's lines
_MOST_POINTS = 800_000  # of one layer's lines; simplified to half a pixel, more would cover two fifths of the panel
# Side of the cells that tell where buildings are, where they are too many to be drawn: not below their distance.
_SPREAD_PX, _SPREAD_M = 12, 40.0


@dataclass(frozen=True)
class Cells:
    """Squares of ``side_m`` from the south west corner (``west``, ``south``) on."""

    west: float
    south: float
    side_m: float
    rows: int
    columns: int

    @classmethod
    def over(cls, box: Box, side_m: float) -> Cells:
        rows, columns = (max(1, int(np.ceil((box[i + 2] - box[i]) / side_m - 1e-9))) for i in (1, 0))
        return cls(box[0], box[1], side_m, rows, columns)

    def count(self, counts: NDArray[np.int64], xy: NDArray[np.float64]) -> None:
        """Add the points ``xy`` to ``counts``; those outside count nowhere."""
        at = np.floor((xy - (self.west, self.south)) / self.side_m).astype(np.int64)
        at = at[((at >= 0) & (at < (self.columns, self.rows))).all(axis=1)]
        np.add.at(counts, (at[:, 1], at[:, 0]), 1)


@dataclass(frozen=True)
class Survey:
    """A city's elements as its overview needs them.

    ``counts``: (len(KINDS),) objects. ``built``, ``others``: (rows, columns) buildings, and other objects, whose middle
    lies in each of ``cells``, from the south west. ``spread``: (m, m) buildings in finer cells of the whole frame.
    ``drawn``: lines by layer number; ``left_out``: layers that would hide the image.
    """

    counts: NDArray[np.int64]
    built: NDArray[np.int64]
    others: NDArray[np.int64]
    cells: Cells
    spread: NDArray[np.int64]
    drawn: dict[int, Lines]
    left_out: tuple[str, ...]


def layers_of(elements: Elements) -> NDArray[np.int64]:
    """Return (N,) the layer of each element; -1 for what is not drawn."""
    points = elements.kind == 0
    found = [_layer(tags) for tags in elements.tags]
    layers = np.array(found, np.int64).reshape(-1)
    return np.where(points & (layers >= 0), _LAYER["points"], layers)


def kinds_of(layers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class of each layer number, -1 for -1."""
    return np.array([layer.kind for layer in LAYERS] + [_NOT_DRAWN])[layers]


def _layer(tags: dict[str, str]) -> int:
    if tags.get("building", "no") != "no":
        return _LAYER["buildings"]
    if "highway" in tags:
        return _LAYER[_ROADS.get(tags["highway"].removesuffix("_link"), "paths")]
    if "railway" in tags:
        return _LAYER["railways"]
    if "waterway" in tags:
        return _LAYER["rivers and lakes" if tags["waterway"] in ("river", "canal") else "streams"]
    if tags.get("natural") in ("water", "coastline", "bay") or tags.get("landuse") in ("reservoir", "basin"):
        return _LAYER["rivers and lakes"]
    if any(tags.get(key) in values for key, values in _GREEN_VALUES.items()):
        return _LAYER["large green"]
    return _NOT_DRAWN if tags.get("boundary") in _INVISIBLE else _LAYER["other objects"]


def outlines(elements: Elements, rows: NDArray[np.int64] | NDArray[np.bool_], box: Box, tolerance_m: float) -> Lines:
    """Return lines and the rings of polygons among ``rows``, cut at ``box``, simplified to ``tolerance_m``."""
    import shapely

    shapes, kinds = elements.geometry[rows], elements.kind[rows]
    parts = np.concatenate([shapely.boundary(shapes[kinds == 2]), shapes[kinds == 1]])
    parts = shapely.clip_by_rect(shapely.get_parts(parts), *box)
    if tolerance_m:
        parts = shapely.simplify(parts, tolerance_m, preserve_topology=False)
    lines = (shapely.get_coordinates(part) for part in shapely.get_parts(parts[~shapely.is_empty(parts)]))
    return [line for line in lines if len(line) > 1]


def survey(path: Path, crs: str, frame: Box, px_m: float, cells: Cells, *, imaged: bool) -> Survey:
    """Read all elements, a row group at a time, for an overview of the square ``frame`` with pixels of ``px_m``.

    ``imaged``: there is an image below them, of which most shall be seen.

    Memory is that of one row group and of what is drawn. Raises :class:`MissingError`, :class:`FormatError`.
    """
    import shapely

    counts = np.zeros(len(KINDS), np.int64)
    fine = Cells.over(frame, max(_SPREAD_PX * px_m, _SPREAD_M))
    built, others = (np.zeros((cells.rows, cells.columns), np.int64) for _ in range(2))
    spread = np.zeros((fine.rows, fine.columns), np.int64)
    ink = np.zeros((len(LAYERS), _GRID, _GRID))
    kept: dict[int, Lines] = {i: [] for i, layer in enumerate(LAYERS) if px_m <= layer.most_m}
    weight = dict.fromkeys(kept, 0)
    seen: set[int] = set()
    for elements in element_groups(path, crs):
        layers = layers_of(elements)
        kinds = kinds_of(layers)
        counts += np.bincount(kinds[kinds >= 0], minlength=len(KINDS))
        seen |= set(layers[layers >= 0].tolist())
        bounds = shapely.bounds(elements.geometry).reshape(-1, 4)
        middles = (bounds[:, :2] + bounds[:, 2:]) / 2
        cells.count(built, middles[kinds == BUILDING])
        cells.count(others, middles[(kinds >= 0) & (kinds != BUILDING)])
        fine.count(spread, middles[kinds == BUILDING])
        area_px = (bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1]) / px_m**2
        for i in list(kept):
            layer = LAYERS[i]
            mine = (layers == i) & ((elements.kind != 2) | (area_px >= layer.least_px))
            if layer.kind == POINT:
                lines: Lines = [xy[None] for xy in shapely.get_coordinates(elements.geometry[mine])]
            else:
                lines = outlines(elements, mine, frame, px_m / 2)
            kept[i] += lines
            weight[i] += sum(map(len, lines))
            _weigh(ink[i], lines, frame, px_m)
            if weight[i] > _MOST_POINTS:
                del kept[i]
    cell_px = ((frame[2] - frame[0]) / px_m / _GRID) ** 2
    drawn = _within_budget(kept, ink, cell_px * (_MOST_INK if imaged and px_m > _CLOSE_M else _MOST_INK_ALONE))
    left_out = tuple(LAYERS[i].name for i in sorted(seen - drawn.keys()))
    return Survey(counts, built, others, cells, spread, {i: lines for i, lines in drawn.items() if lines}, left_out)


def _weigh(ink: NDArray[np.float64], lines: Lines, frame: Box, px_m: float) -> None:
    """Add the square screen pixels that ``lines`` cover to the cells of ``ink``."""
    if not lines:
        return
    joined = np.concatenate(lines)
    whose = np.repeat(np.arange(len(lines)), [len(line) for line in lines])
    same = whose[1:] == whose[:-1]
    starts, steps = joined[:-1][same], np.diff(joined, axis=0)[same]
    cell_m = (frame[2] - frame[0]) / _GRID
    # A long straight step lies in many cells: it is weighed in pieces of half a cell.
    pieces = np.maximum(np.ceil(np.hypot(*steps.T) / (cell_m / 2)), 1).astype(np.int64)
    which = np.repeat(np.arange(len(steps)), pieces)
    part = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 0.5) / pieces[which]
    middles = starts[which] + steps[which] * part[:, None]
    covered = (np.hypot(*steps.T) / px_m * _LINE_PX / pieces)[which]
    single = np.array([len(line) == 1 for line in lines])[whose]
    middles, covered = np.concatenate([middles, joined[single]]), np.concatenate([covered, np.full(single.sum(), 9.0)])
    at = ((middles - frame[:2]) / cell_m).astype(np.int64).clip(0, _GRID - 1)
    np.add.at(ink, (at[:, 1], at[:, 0]), covered)


def _within_budget(kept: dict[int, Lines], ink: NDArray[np.float64], most_px: float) -> dict[int, Lines]:
    """Return the layers that fit together, in order of their weight for finding one's way."""
    occupied = ink.sum(axis=0) > 0
    drawn: dict[int, Lines] = {}
    used = np.zeros_like(ink[0])
    for i, lines in kept.items():
        more = used + ink[i]
        if not occupied.any() or np.percentile(more[occupied], 90) <= most_px:
            drawn[i], used = lines, more
    return drawn
