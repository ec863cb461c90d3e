"""The picture of the demo town: a stylised aerial photograph, drawn with arrays in a few seconds.

Light comes from the west-south-west; heights, roofs and canopies are shaded by it and throw shadows. Pixels are square,
``gsd_m`` metres; row 0 lies in the north.
"""

from __future__ import annotations

import numpy as np
import shapely
import shapely.affinity
import shapely.ops
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rasterio.features import rasterize
from rasterio.transform import Affine
from scipy.ndimage import distance_transform_edt, gaussian_filter
from shapely import Polygon

from rsosm_cli.town.layout import ROAD_WIDTHS, Layout
from rsosm_cli.town.objects import Building, Objects, parts, shadow_of

_SUN = np.array([-0.86, -0.5])  # from where light comes, x east, y north
_SHADOW_PER_M = 0.72  # metres of shadow a metre of height
_STRIP = 512  # rows painted at a time: the arrays of one strip stay in the cache

# Colour of each kind of ground, a second colour that patches of it take, and how strong patches, grain and rows are;
# the last number is the distance of rows in metres.
_GROUND: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], float, float, float, float]] = {
    "waste": ((128, 134, 96), (150, 144, 112), 0.8, 0.06, 0.0, 1.0),
    "lawn": ((108, 132, 76), (134, 146, 92), 0.8, 0.05, 0.0, 1.0),
    "meadow": ((122, 142, 80), (150, 152, 100), 1.0, 0.06, 0.0, 1.0),
    "forest": ((52, 72, 44), (66, 84, 52), 0.8, 0.08, 0.0, 1.0),
    "crop": ((98, 134, 66), (116, 144, 80), 0.6, 0.04, 0.09, 3.4),
    "wheat": ((196, 178, 118), (182, 160, 104), 0.6, 0.03, 0.06, 4.6),
    "soil": ((142, 116, 90), (124, 100, 78), 0.8, 0.05, 0.10, 2.8),
    "rape": ((196, 188, 70), (176, 174, 76), 0.6, 0.04, 0.05, 4.0),
    "paving": ((164, 160, 152), (150, 146, 140), 0.5, 0.03, 0.0, 1.0),
    "yard": ((168, 160, 146), (148, 142, 132), 0.8, 0.05, 0.0, 1.0),
    "asphalt": ((112, 112, 114), (124, 122, 122), 0.6, 0.03, 0.0, 1.0),
    "parking": ((104, 104, 108), (112, 112, 114), 0.5, 0.03, 0.0, 1.0),
    "pitch": ((92, 142, 70), (98, 148, 76), 0.4, 0.03, 0.10, 10.0),
    "court": ((160, 92, 74), (164, 98, 80), 0.3, 0.02, 0.0, 1.0),
    "pool": ((110, 190, 206), (120, 200, 214), 0.4, 0.02, 0.0, 1.0),
    "pond": ((62, 84, 78), (70, 92, 84), 0.4, 0.02, 0.0, 1.0),
}
_ROADS = {
    "primary": (116, 116, 120),
    "secondary": (120, 120, 122),
    "residential": (128, 127, 126),
    "track": (170, 152, 122),
}

Array = NDArray[np.float32]


def paint(rng: Generator, layout: Layout, objects: Objects, gsd_m: float) -> NDArray[np.uint8]:
    """Return the picture, (3, H, W) uint8."""
    canvas = _Canvas(layout.size_m, gsd_m)
    noise = _Noise(rng, canvas.side)
    image = _ground(canvas, noise, objects)
    _water(canvas, noise, image, layout)
    _streets(canvas, noise, image, layout, objects)
    _cars(canvas, image, objects)
    shade = canvas.mask([(shadow_of(b.polygon, *_fall(b.height_m)), 1.0) for b in objects.buildings])
    trees = np.array(objects.trees, np.float64).reshape(-1, 3)
    np.maximum(shade, _tree_shadows(canvas, trees), out=shade)
    shade = gaussian_filter(shade, 0.7)
    # Light of the sky in the shadows is blue.
    _blend(image, 0.52 * shade, (0.0, 8.0, 24.0))
    _roofs(rng, canvas, noise, image, objects.buildings)
    _canopies(rng, canvas, image, trees)
    return _develop(rng, noise, image)


def _fall(height_m: float) -> tuple[float, float]:
    return float(-_SUN[0] * height_m * _SHADOW_PER_M), float(-_SUN[1] * height_m * _SHADOW_PER_M)


class _Canvas:
    def __init__(self, size_m: float, gsd_m: float) -> None:
        self.gsd_m = gsd_m
        self.side = round(size_m / gsd_m)
        self.transform = Affine(gsd_m, 0, 0, 0, -gsd_m, size_m)
        self.size_m = size_m

    def burn(self, shapes: list[tuple[shapely.Geometry, int]]) -> NDArray[np.int32]:
        """Return (H, W) int32: the number of the last shape over each pixel, 0 where there is none."""
        shapes = [s for s in shapes if not s[0].is_empty]
        if not shapes:
            return np.zeros((self.side, self.side), np.int32)
        return rasterize(shapes, (self.side, self.side), transform=self.transform, dtype="int32")

    def mask(self, shapes: list[tuple[shapely.Geometry, float]]) -> Array:
        """Return (H, W) float32, 1 inside the shapes."""
        return self.burn([(g, 1) for g, _ in shapes]).astype(np.float32)

    def xy(self, coords: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return pixel (column, row) of metres (n, 2)."""
        return np.stack([coords[:, 0], self.size_m - coords[:, 1]], axis=1) / self.gsd_m


class _Noise:
    """Smooth noise of mean 0 and deviation about 1, (H, W) float32, by the size of its lumps in pixels."""

    def __init__(self, rng: Generator, side: int) -> None:
        self.fine = rng.standard_normal((side, side), np.float32)
        self.small = self._lumps(rng, side, 3)
        self.medium = self._lumps(rng, side, 18)
        self.large = self._lumps(rng, side, 90)
        self.wide = self._lumps(rng, side, 700)

    @staticmethod
    def _lumps(rng: Generator, side: int, lump_px: int) -> Array:
        coarse = Image.fromarray(rng.standard_normal((side // lump_px + 3,) * 2, np.float32))
        scale = (coarse.width * lump_px,) * 2
        fine = np.asarray(coarse.resize(scale, Image.Resampling.BICUBIC), np.float32)
        return fine[:side, :side] * np.float32(1.25)


def _ground(canvas: _Canvas, noise: _Noise, objects: Objects) -> Array:
    surfaces = [s for _, s in objects.surfaces]
    number = canvas.burn([(s.polygon, i + 1) for i, s in enumerate(surfaces)])
    table = [_GROUND["waste"], *(_GROUND[s.kind] for s in surfaces)]
    first, second = (np.array([row[i] for row in table], np.float32) for i in (0, 1))
    patch, grain, rows, period = (np.array([row[i] for row in table], np.float32) for i in (2, 3, 4, 5))
    angle = np.array([0.0, *(s.angle for s in surfaces)], np.float32)
    tone = np.array([0.0, *(s.tone for s in surfaces)], np.float32)
    turn = 2 * np.pi / period
    along_x, along_y = -np.sin(angle) * turn, np.cos(angle) * turn  # rows run along the angle
    image = np.empty((canvas.side, canvas.side, 3), np.float32)
    x = (np.arange(canvas.side, dtype=np.float32) + 0.5) * canvas.gsd_m
    for top in range(0, canvas.side, _STRIP):
        cut = slice(top, top + _STRIP)
        n = number[cut]
        y = (canvas.size_m - (np.arange(top, top + len(n), dtype=np.float32) + 0.5) * canvas.gsd_m)[:, None]
        medium, large = noise.medium[cut], noise.large[cut]
        mix = np.clip(0.5 + 0.45 * patch[n] * (0.6 * medium + 0.8 * large), 0, 1)[..., None]
        light = 1 + grain[n] * (0.8 * noise.small[cut] + 0.5 * medium) + 0.07 * tone[n]
        light += rows[n] * np.sin(along_x[n] * x + along_y[n] * y + 0.5 * medium)
        image[cut] = (first[n] * (1 - mix) + second[n] * mix) * light[..., None]
    return image


def _blend(
    image: Array,
    weight: Array,
    colour: tuple[float, ...] | Array,
    grain: Array | None = None,
    depth: Array | None = None,
) -> None:
    """Lay a colour over the image with a weight (H, W) of 0..1, where the weight is not 0.

    ``grain`` (H, W) lightens it; with ``depth`` (H, W) of 0..1, ``colour`` is two rows, from shallow to deep.
    """
    rows, cols = np.nonzero(weight)
    over = np.asarray(colour, np.float32)
    if depth is not None:
        over = over[0] + depth[rows, cols, None] * (over[1] - over[0])
    if grain is not None:
        over = over + grain[rows, cols, None]
    under = image[rows, cols]
    image[rows, cols] = under + weight[rows, cols, None] * (over - under)


def _water(canvas: _Canvas, noise: _Noise, image: Array, layout: Layout) -> None:
    wet = canvas.mask([(layout.river_water, 1.0), (layout.lake, 1.0)])
    beach = canvas.mask([(layout.river_water.buffer(3.5), 1.0), (layout.lake.buffer(6), 1.0)])
    _blend(image, 0.75 * gaussian_filter(beach, 1.5), (184, 172, 138))
    # Depth is smooth: a quarter of the resolution does.
    coarse = distance_transform_edt(wet[::4, ::4]) * (4 * canvas.gsd_m / 16)
    depth = np.minimum(np.kron(coarse, np.ones((4, 4), np.float32)), 1).astype(np.float32)
    depth = gaussian_filter(depth[: canvas.side, : canvas.side], 3)
    colours = np.array([(104, 128, 118), (44, 74, 88)], np.float32)
    _blend(image, gaussian_filter(wet, 0.7), colours, 1.6 * noise.small + 2.5 * noise.large, depth)


def _streets(canvas: _Canvas, noise: _Noise, image: Array, layout: Layout, objects: Objects) -> None:
    grain = 3.0 * noise.small + 3.0 * noise.medium
    paths = canvas.mask([(p.buffer(1.2), 1.0) for _, p in objects.paths])
    _blend(image, 0.9 * gaussian_filter(paths, 0.6), (192, 178, 150))
    ballast = canvas.mask([(layout.rail.buffer(3.2), 1.0)])
    _blend(image, 0.9 * gaussian_filter(ballast, 0.8), (122, 112, 104), 2 * grain)
    rails = [(layout.rail.offset_curve(o), 0.5) for o in (-0.75, 0.75)]
    _lines(canvas, image, rails, (86, 82, 82), 0.85)
    kerbs = [r for r in layout.roads if r.highway != "track"]
    pavement = canvas.mask([(r.line.buffer(ROAD_WIDTHS[r.highway] / 2 + 1.6), 1.0) for r in kerbs])
    _blend(image, 0.85 * pavement, (172, 168, 160), grain)
    for highway in ("track", "residential", "secondary", "primary"):
        lines = [r.line for r in layout.roads if r.highway == highway]
        surface = canvas.mask([(line.buffer(ROAD_WIDTHS[highway] / 2), 1.0) for line in lines])
        weight = gaussian_filter(surface, 0.6) * (0.8 if highway == "track" else 1)
        _blend(image, weight, _ROADS[highway], grain)
    for highway in ("secondary", "primary"):
        lines = [r.line for r in layout.roads if r.highway == highway]
        dashes = [
            (shapely.ops.substring(line, s, s + 3.0), 0.35) for line in lines for s in np.arange(4, line.length - 6, 8)
        ]
        _lines(canvas, image, dashes, (232, 232, 226), 0.75)
        if highway == "primary":
            edges = [(line.offset_curve(o), 0.3) for line in lines for o in (-5.6, 5.6)]
            _lines(canvas, image, edges, (220, 220, 214), 0.5)
    _lines(canvas, image, objects.marks, (226, 226, 222), 0.7)


def _lines(
    canvas: _Canvas,
    image: Array,
    lines: list[tuple[shapely.Geometry, float]],
    colour: tuple[int, int, int],
    strength: float,
) -> None:
    """Draw thin lines of a width in metres, softened at the edges by drawing at twice the resolution."""
    sheet = Image.new("L", (2 * canvas.side, 2 * canvas.side))
    pen = ImageDraw.Draw(sheet)
    for line, width_m in lines:
        if line.geom_type == "LineString" and not line.is_empty:
            xy = 2 * canvas.xy(np.array(line.coords))
            pen.line(xy.ravel().tolist(), fill=255, width=max(1, round(2 * width_m / canvas.gsd_m)))
    weight = np.asarray(sheet.reduce(2), np.float32) * np.float32(strength / 255)
    _blend(image, weight, colour)


def _cars(canvas: _Canvas, image: Array, objects: Objects) -> None:
    dx, dy = _fall(1.6)
    shade = canvas.mask([(shapely.affinity.translate(p, dx, dy), 1.0) for p, _ in objects.cars])
    _blend(image, 0.4 * gaussian_filter(shade, 0.5), (0.0, 0.0, 0.0))
    number = canvas.burn([(p, i + 1) for i, (p, _) in enumerate(objects.cars)])
    colours = np.array([(0, 0, 0), *(c for _, c in objects.cars)], np.float32)
    rows, cols = np.nonzero(number)
    image[rows, cols] = colours[number[rows, cols]]


def _roofs(rng: Generator, canvas: _Canvas, noise: _Noise, image: Array, buildings: list[Building]) -> None:
    """Paint roofs face by face: each face is as bright as it is turned to the sun."""
    faces: list[tuple[Polygon, NDArray[np.float32], float, float]] = []  # shape, colour, rows' angle, strength
    for b in buildings:
        colour = np.array(b.colour, np.float32)
        if b.roof == "gable" and not b.polygon.interiors:
            faces += _gable(b.polygon, colour)
        elif b.roof == "metal":
            faces += _metal(b.polygon, colour)
        elif b.roof == "round":
            c = b.polygon.centroid
            faces += [
                (b.polygon, 0.8 * colour, 0, 0),
                (shapely.affinity.translate(b.polygon.buffer(-0.8), -0.4, -0.3), colour * 1.1, 0, 0),
            ]
            faces += [(c.buffer(0.8), 0.7 * colour, 0, 0)]
        else:
            faces += _flat(rng, b.polygon, colour)
    number = canvas.burn([(f[0], i + 1) for i, f in enumerate(faces)])
    colours = np.array([(0, 0, 0), *(f[1] for f in faces)], np.float32)
    angle = np.array([0, *(f[2] for f in faces)], np.float32)
    ribs = np.array([0, *(f[3] for f in faces)], np.float32)
    rows, cols = np.nonzero(number)
    n = number[rows, cols]
    across = (-np.sin(angle[n]) * cols - np.cos(angle[n]) * rows) * canvas.gsd_m
    light = 1 + 0.025 * noise.small[rows, cols] + 0.03 * noise.medium[rows, cols]
    light += ribs[n] * np.sin(across * 2 * np.pi / 2.9)
    image[rows, cols] = colours[n] * light[:, None]


def _lit(dx: float, dy: float) -> float:
    """Return the brightness of a roof face that falls towards (dx, dy)."""
    length = np.hypot(dx, dy) or 1.0
    return float(1 + 0.24 * (dx * _SUN[0] + dy * _SUN[1]) / length)


def _gable(polygon: Polygon, colour: Array) -> list[tuple[Polygon, Array, float, float]]:
    box = np.array(shapely.minimum_rotated_rectangle(polygon).exterior.coords)[:4]
    if np.linalg.norm(box[1] - box[0]) < np.linalg.norm(box[2] - box[1]):
        box = np.roll(box, -1, axis=0)
    # box[0]-box[1] and box[2]-box[3] are the eaves; the ridge runs between the middles of the gables.
    ends = (box[0] + box[3]) / 2, (box[1] + box[2]) / 2
    angle = float(np.arctan2(*(ends[1] - ends[0])[::-1]))
    faces = []
    for eave in ((box[0], box[1]), (box[3], box[2])):
        half = Polygon([eave[0], eave[1], ends[1], ends[0]]).intersection(polygon)
        fall = (eave[0] + eave[1]) / 2 - (ends[0] + ends[1]) / 2
        faces += [(p, colour * _lit(*fall), angle, 0.03) for p in parts(half)]
    ridge = shapely.LineString(ends).intersection(polygon).buffer(0.35)
    return [*faces, *((p, colour * 1.12, 0.0, 0.0) for p in parts(ridge))]


def _metal(polygon: Polygon, colour: Array) -> list[tuple[Polygon, Array, float, float]]:
    faces = _gable(polygon, colour)
    angle = faces[0][2]
    ribbed = [(p, c, angle + np.pi / 2, 0.05) for p, c, _, _ in faces[:-1]]
    c = polygon.centroid
    west, _, east, _ = shapely.affinity.rotate(polygon, -angle, (c.x, c.y), use_radians=True).bounds
    for x in np.arange(west + 6, east - 5, 9):  # skylights
        strip = shapely.box(x, c.y + 2.5, x + 1.6, c.y + 7)
        light = shapely.affinity.rotate(strip, angle, (c.x, c.y), use_radians=True)
        ribbed += [(p, np.clip(colour * 1.25, 0, 250), 0.0, 0.0) for p in parts(light.intersection(polygon))]
    return ribbed


def _flat(rng: Generator, polygon: Polygon, colour: Array) -> list[tuple[Polygon, Array, float, float]]:
    faces: list[tuple[Polygon, Array, float, float]] = [(polygon, np.clip(colour * 1.16, 0, 250), 0.0, 0.0)]
    inner = polygon.buffer(-0.9, join_style="mitre")
    faces += [(p, colour * 0.86, 0.0, 0.0) for p in parts(inner)]  # inside the parapet, shaded at its sunny side
    dx, dy = _fall(0.9)
    faces += [(p, colour, 0.0, 0.0) for p in parts(inner.intersection(shapely.affinity.translate(inner, dx, dy)))]
    west, south, east, north = inner.bounds if not inner.is_empty else polygon.bounds
    for x, y in rng.uniform((west, south), (east, north), (1 + int(polygon.area / 220), 2)):
        unit = shapely.box(x, y, x + rng.uniform(1.5, 4), y + rng.uniform(1.5, 3))
        if inner.buffer(-1.2).contains(unit):
            faces.append((shapely.affinity.translate(unit, *_fall(1.5)), colour * 0.6, 0.0, 0.0))
            faces.append((unit, np.clip(colour * 1.15, 0, 250), 0.0, 0.0))
    return faces


def _stamps(
    canvas: _Canvas, trees: NDArray[np.float64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], Array, Array, NDArray[np.int64]]]:
    """Return, by class of radius: rows, cols (n, k), offsets in radii (k, 2), weight (k), tree numbers (n)."""
    made = []
    at = canvas.xy(trees[:, :2]) if len(trees) else np.empty((0, 2))
    radius_px = trees[:, 2] / canvas.gsd_m
    for radius in np.unique(np.round(radius_px * 2) / 2):
        chosen = np.flatnonzero(np.round(radius_px * 2) / 2 == radius)
        reach = int(np.ceil(radius))
        grid = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T[:, ::-1]  # (k, 2) x, y
        grid = grid[np.hypot(*grid.T) <= radius + 0.2]
        cols = np.round(at[chosen, 0]).astype(np.int64)[:, None] + grid[:, 0]
        rows = np.round(at[chosen, 1]).astype(np.int64)[:, None] + grid[:, 1]
        weight = np.clip(radius + 0.7 - np.hypot(*grid.T), 0, 1).astype(np.float32)
        made.append((rows, cols, (grid / max(radius, 1)).astype(np.float32), weight, chosen))
    return made


def _tree_shadows(canvas: _Canvas, trees: NDArray[np.float64]) -> Array:
    shade = np.zeros((canvas.side, canvas.side), np.float32)
    for step in (0.5, 1.0):
        dx, dy = np.array(_fall(1.0)) * step
        moved = trees + np.stack([dx * 1.9 * trees[:, 2], dy * 1.9 * trees[:, 2], -0.1 * trees[:, 2]], axis=1)
        for rows, cols, _, _, _ in _stamps(canvas, moved):
            inside = (rows >= 0) & (rows < canvas.side) & (cols >= 0) & (cols < canvas.side)
            shade[rows[inside], cols[inside]] = 0.9
    return shade


def _canopies(rng: Generator, canvas: _Canvas, image: Array, trees: NDArray[np.float64]) -> None:
    """Stamp crowns: lit on the sunny side, dark on the other, with lumps of leaves."""
    green = np.array([[70, 96, 50], [84, 108, 54], [60, 88, 52], [98, 112, 60]], np.float32)
    colour = green[rng.integers(0, len(green), len(trees))] * rng.uniform(0.85, 1.15, (len(trees), 1)).astype(
        np.float32
    )
    for rows, cols, offset, weight, chosen in _stamps(canvas, trees):
        ball = np.sqrt(np.clip(1 - (offset**2).sum(1), 0, 1))
        light = 0.72 + 0.36 * (offset[:, 0] * _SUN[0] - offset[:, 1] * _SUN[1]) + 0.34 * ball
        leaves = rng.standard_normal(rows.shape).astype(np.float32) * 0.09
        crown = colour[chosen][:, None, :] * (light + leaves)[..., None]  # (n, k, 3)
        inside = (rows >= 0) & (rows < canvas.side) & (cols >= 0) & (cols < canvas.side)
        r, c = rows[inside], cols[inside]
        w = np.broadcast_to(weight, rows.shape)[inside][:, None]
        image[r, c] = image[r, c] * (1 - w) + crown[inside] * w


def _develop(rng: Generator, noise: _Noise, image: Array) -> NDArray[np.uint8]:
    """Return the finished picture: the lens's softness, uneven light, sensor noise."""
    picture = np.empty((3, *image.shape[:2]), np.uint8)
    light = 1 + 0.02 * noise.wide + 0.01 * noise.large
    for band, (gain, haze) in enumerate([(1.0, 4), (1.0, 6), (0.97, 12)]):
        plane = gaussian_filter(image[..., band], 0.55) * light * gain + haze
        plane += 1.6 * noise.fine
        picture[band] = np.clip(plane, 0, 255).astype(np.uint8)
    return picture
