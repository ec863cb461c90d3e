"""A picture to check that OSM and image lie on each other: outlines over the image, the whole place and a detail."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.geometry import WGS84, Projection, reproject, utm_crs
from rsosm_cli.osm.elements import Elements, read_elements
from rsosm_cli.workspace import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from shapely import Geometry

_PANEL_PX = 900  # side of a panel
_DETAIL_M = 200.0  # side of the detail: single houses show, and an offset of a metre or two
_MOST_SHAPES = 40_000  # drawn in the overview: more would only blacken it
# Bright, as they lie on photographs.
COLOURS = {"point": "#ff7a1a", "line": "#2fe6e6", "polygon": "#ffe14d"}
_INK, _PAPER, _GROUND = "#22303c", "#fbfaf7", "#efece4"

Box = tuple[float, float, float, float]


def draw_city(name: str, place: Geometry, osm: Path, image: Path | None, path: Path) -> dict[str, Any]:
    """Draw a place (WGS 84) with its elements over its image to a PNG at ``path``; return what the picture shows.

    Left the whole place, right the square of 200 m with the most buildings (or other areas). Raises
    :class:`MissingError` and :class:`FormatError` for the files, :class:`SourceError` for the image.
    """
    import shapely
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    crs = utm_crs(place)
    ground = reproject(np.array([place], dtype=object), WGS84, crs)[0]
    elements = read_elements(osm, crs)
    whole: Box = tuple(map(float, ground.bounds))  # type: ignore[assignment]
    detail = _densest(elements, whole)
    height = (whole[3] - whole[1]) / max(whole[2] - whole[0], 1e-9)
    figure = Figure(figsize=(16, 8.6), dpi=110, facecolor=_PAPER)
    titles = (f"{name}: {len(elements):,} OSM objects", f"Detail, {_DETAIL_M:.0f} m")
    for number, (box, title) in enumerate(zip((whole, detail), titles, strict=True)):
        axes = figure.add_axes((0.02 + 0.49 * number, 0.03, 0.47, 0.9), facecolor=_GROUND)
        if image is not None:
            _picture(axes, image, crs, box)
        _outlines(axes, elements, box, thin=number == 0 and height > 0)
        if number == 0:
            for ring in shapely.get_parts(shapely.boundary(ground)):
                axes.plot(*shapely.get_coordinates(ring).T, color=_INK, lw=1.2)
            x, y = np.array(detail)[[0, 2, 2, 0, 0]], np.array(detail)[[1, 1, 3, 3, 1]]
            axes.plot(x, y, color="#d1495b", lw=1.6)
        axes.set(xlim=(box[0], box[2]), ylim=(box[1], box[3]), aspect="equal", xticks=(), yticks=())
        axes.set_title(title, color=_INK, fontsize=12, loc="left")
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": "rsosm"})
    with atomic(path) as part:
        part.write_bytes(out.getvalue())
    west, south, east, north = _wgs84(detail, crs)
    return {"objects": len(elements), "detail": f"{west:.5f} {south:.5f} {east:.5f} {north:.5f}"}


def _wgs84(box: Box, crs: str) -> Box:
    from pyproj import Transformer

    found = Transformer.from_crs(crs, WGS84, always_xy=True).transform_bounds(*box)
    return (found[0], found[1], found[2], found[3])


def _densest(elements: Elements, whole: Box) -> Box:
    """Return the square of ``_DETAIL_M`` with the most buildings; without any, the most objects."""
    import shapely

    built = np.array(["building" in tags for tags in elements.tags], bool)
    chosen = elements.geometry[built] if built.any() else elements.geometry
    centre = ((whole[0] + whole[2]) / 2, (whole[1] + whole[3]) / 2)
    if len(chosen):
        points = shapely.get_coordinates(shapely.centroid(chosen))
        inside = (points >= whole[:2]).all(axis=1) & (points <= whole[2:]).all(axis=1)
        cells = np.floor(points[inside] / _DETAIL_M).astype(np.int64)
        if len(cells):
            found, counts = np.unique(cells, axis=0, return_counts=True)
            x, y = (found[counts.argmax()] + 0.5) * _DETAIL_M
            centre = (float(x), float(y))
    half = _DETAIL_M / 2
    return centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half


def _picture(axes: Axes, image: Path, crs: str, box: Box) -> None:
    from rsosm_cli.imagery.raster import inspect
    from rsosm_cli.imagery.reader import ImageReader

    gsd = max(box[2] - box[0], box[3] - box[1]) / _PANEL_PX
    projection = Projection(crs, gsd)
    pixels = projection.pixels_around(*box)
    bands = (1, 2, 3) if len(inspect(str(image)).bands) >= 3 else (1, 1, 1)
    with ImageReader(image, bands) as reader:
        picture, valid = reader.read(projection, pixels)
    shown: NDArray[np.uint8] = np.dstack([*picture, valid.astype(np.uint8) * 255])
    g = projection.gsd_m
    extent = (pixels.col_min * g, pixels.col_max * g, -pixels.row_max * g, -pixels.row_min * g)
    axes.imshow(shown, extent=extent, origin="upper", interpolation="none")


def _outlines(axes: Axes, elements: Elements, box: Box, *, thin: bool) -> None:
    import shapely
    from matplotlib.collections import LineCollection

    bounds = shapely.bounds(elements.geometry)
    near = (bounds[:, 0] <= box[2]) & (bounds[:, 2] >= box[0]) & (bounds[:, 1] <= box[3]) & (bounds[:, 3] >= box[1])
    rows = np.flatnonzero(near)
    rows = rows[:: max(1, math.ceil(len(rows) / _MOST_SHAPES))]
    width = 0.5 if thin else 1.3
    for kind, name in enumerate(("point", "line", "polygon")):
        shapes = elements.geometry[rows[elements.kind[rows] == kind]]
        colour = COLOURS[name]
        if name == "point":
            xy = shapely.get_coordinates(shapes)
            axes.plot(xy[:, 0], xy[:, 1], "o", ms=1 if thin else 4, color=colour, mec="none")
            continue
        parts = shapely.get_parts(shapely.boundary(shapes) if name == "polygon" else shapes)
        lines = [shapely.get_coordinates(part) for part in shapely.get_parts(parts)]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=width))
