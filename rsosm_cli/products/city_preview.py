"""A picture to check that OSM and image lie on each other: the whole place, and windows with and without outlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import MissingError
from rsosm_cli.geometry import WGS84, PixelBounds, Projection, reproject, utm_crs
from rsosm_cli.products.city_layers import Box, Cells, Survey, survey
from rsosm_cli.workspace import atomic

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.imagery.reader import ImageReader

PANEL_PX, GAP_PX, CAPTION_PX = 480, 20, 26
OVERVIEW_PX = 2 * PANEL_PX + GAP_PX + CAPTION_PX  # as high as two windows with their captions
# A window is half as many image pixels wide as its panel has, so that every pixel shows; but at least two or three
# houses, and at most what still shows single houses (imagery of 10 m), or 40 pixels.
_WINDOW_M, _ALONE_M, _MOST_WINDOW_M, _LEAST_WINDOW_PX = 160.0, 240.0, 600.0, 40
_MARGIN_SHARE = 0.02  # of the overview, around the place


@dataclass(frozen=True)
class Ground:
    """The image (H, W, 3) of a square and where there is any (H, W), in ``box``."""

    box: Box
    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class CityPicture:
    """What a sheet shows. ``windows``: squares in metres of ``crs``, marked A, B in the overview."""

    name: str
    crs: str
    place: Geometry  # in ``crs``
    osm: Path | None
    overview: Ground
    survey: Survey | None
    windows: tuple[Ground, ...]
    gsd_m: float | None
    bands: int
    notes: tuple[str, ...]
    credits: str

    @property
    def has_image(self) -> bool:
        return self.gsd_m is not None


def draw_city(
    name: str, place: Geometry, osm: Path, image: Path | None, path: Path, *, sources: Sequence[dict[str, str]] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Draw a place (WGS 84) with its elements over its image to a PNG; return numbers and notes of what it shows.

    Left the whole place with as many outlines as leave the image visible; right up to two windows, at the image's own
    resolution, where it shows most buildings: the image alone, and under the outlines. Memory does not grow with the
    city. Raises :class:`MissingError` where there is neither OSM nor image, :class:`FormatError` and
    :class:`SourceError` for damaged files.
    """
    from rsosm_cli.products.city_sheet import png

    if not osm.is_file() and image is None:
        raise MissingError(
            f"{name} has neither OSM elements nor imagery to draw.", hint="Run `rsosm fetch --city` for it again."
        )
    picture = _picture(name, place, osm if osm.is_file() else None, image, sources)
    with atomic(path) as part:
        part.write_bytes(png(picture))
    numbers: dict[str, Any] = {"objects": 0 if picture.survey is None else int(picture.survey.counts.sum())}
    if picture.gsd_m is not None:
        numbers["image_pixel"] = f"{picture.gsd_m:.3g} m"
        numbers["image_in_overview"] = f"{picture.overview.valid.mean():.0%} of the square"
    for letter, window in zip("AB", picture.windows, strict=False):
        west, south, east, north = _wgs84(window.box, picture.crs)
        side = window.box[2] - window.box[0]
        numbers[f"window_{letter}"] = (
            f"{side:.0f} m wide; west, south, east, north {west:.5f} {south:.5f} {east:.5f} {north:.5f} degrees"
        )
    return numbers, picture.notes


def _picture(
    name: str, place: Geometry, osm: Path | None, image: Path | None, sources: Sequence[dict[str, str]]
) -> CityPicture:
    from rsosm_cli.imagery.raster import inspect
    from rsosm_cli.imagery.reader import ImageReader

    crs = utm_crs(place)
    ground = reproject(np.array([place], dtype=object), WGS84, crs)[0]
    frame = _frame(ground.bounds)
    credits = _credits(sources)
    if image is None:
        return _finish(name, crs, ground, osm, None, 0, frame, credits)
    bands = len(inspect(str(image)).bands)
    with ImageReader(image, (1, 2, 3) if bands >= 3 else (1, 1, 1)) as reader:
        return _finish(name, crs, ground, osm, reader, bands, frame, credits)


def _finish(
    name: str, crs: str, ground: Geometry, osm: Path | None, reader: ImageReader | None, bands: int, frame: Box,
    credits: str,
) -> CityPicture:  # fmt: skip
    overview = _read(reader, crs, frame, OVERVIEW_PX)
    gsd = reader.gsd_in(crs) if reader is not None else None
    side = overview.box[2] - overview.box[0]
    size = min(_window_m(gsd), side)
    known = None
    if osm is not None:
        cells = Cells.over(ground.bounds, size)
        known = survey(osm, crs, overview.box, side / OVERVIEW_PX, cells, imaged=bool(overview.valid.any()))
    notes: list[str] = []
    objects = known is not None and bool(known.counts.sum())
    if reader is None:
        notes.append(f"There is no imagery of {name}: the outlines are drawn alone.")
    elif not overview.valid.any():
        notes.append(f"The imagery does not reach {name}: nothing shows whether OSM lies where it should.")
    if not objects:
        notes.append(f"There are no OSM objects of {name}: the image is drawn alone.")
    windows: list[Box] = []
    if known is not None and objects and (reader is None or overview.valid.any()):
        windows = _choose(known, overview, ground.bounds, imaged=reader is not None)
        if not windows:
            notes.append("OSM objects and imagery do not overlap: nothing shows whether they lie on each other.")
    grounds = tuple(_read(reader, crs, box, PANEL_PX) for box in windows)
    return CityPicture(name, crs, ground, osm, overview, known, grounds, gsd, bands, tuple(notes), credits)


def _frame(bounds: tuple[float, float, float, float]) -> Box:
    """Return the square around a place, with a margin: all panels are squares of one size or another."""
    west, south, east, north = bounds
    half = max(east - west, north - south, 20.0) * (0.5 + _MARGIN_SHARE)
    x, y = (west + east) / 2, (south + north) / 2
    return x - half, y - half, x + half, y + half


def _window_m(gsd: float | None) -> float:
    if gsd is None:
        return _ALONE_M
    return min(max(PANEL_PX / 2 * gsd, _WINDOW_M), max(_MOST_WINDOW_M, _LEAST_WINDOW_PX * gsd))


def _read(reader: ImageReader | None, crs: str, box: Box, px: int) -> Ground:
    """Read ``px`` x ``px`` pixels of about ``box``; its edges move to whole pixels, so that none is drawn shifted."""
    projection = Projection(crs, (box[2] - box[0]) / px)
    g = projection.gsd_m
    col, row = round(box[0] / g), round(-box[3] / g)
    bounds = PixelBounds(col, row, col + px, row + px)
    snapped = projection.bounds_of(bounds)
    if reader is None:
        return Ground(snapped, np.zeros((px, px, 3), np.uint8), np.zeros((px, px), bool))
    pixels, valid = reader.read(projection, bounds)
    return Ground(snapped, pixels.transpose(1, 2, 0), valid)


def _choose(known: Survey, overview: Ground, place: Box, *, imaged: bool) -> list[Box]:
    """Return up to two squares with many buildings (or else objects) and imagery, the second far from the first.

    Far apart, because a shift is the same everywhere, and an error of scale or rotation is not.
    """
    size, (rows, columns) = known.cells.side_m, known.built.shape
    # The last cells reach out of the place: their windows are moved into it, as far as it is wide enough.
    wests = _starts(place[0], place[2], size, columns)
    souths = _starts(place[1], place[3], size, rows)
    share = _valid_share(overview, wests, souths, size) if imaged else np.ones(known.built.shape)
    score = known.built * share**2
    if not score.any():  # no building has an image, but something else may
        score = known.others * share**2
    reach = max(0.4 * math.hypot(rows, columns), 2)  # beyond that, farther is not better
    ys, xs = np.mgrid[:rows, :columns]
    chosen: list[Box] = []
    for _ in range(2):
        best = int(score.argmax())
        if score.flat[best] <= 0:
            break
        row, column = divmod(best, columns)
        west, south = float(wests[column]), float(souths[row])
        chosen.append((west, south, west + size, south + size))
        away = np.hypot(ys - row, xs - column)
        overlap = np.outer(np.abs(souths - south) < 0.99 * size, np.abs(wests - west) < 0.99 * size)
        score = np.where(overlap, 0.0, score * np.minimum(away / reach, 1))
    return chosen


def _starts(low: float, high: float, size: float, n: int) -> NDArray[np.float64]:
    if high - low <= size:
        return np.full(n, (low + high - size) / 2)
    return np.minimum(low + np.arange(n) * size, high - size)


def _valid_share(
    overview: Ground, wests: NDArray[np.float64], souths: NDArray[np.float64], size: float
) -> NDArray[np.float64]:
    """Return (rows, columns), from the south west, the share of each window that has an image."""
    px = len(overview.valid)
    px_m = (overview.box[2] - overview.box[0]) / px
    sums = np.zeros((px + 1, px + 1))
    sums[1:, 1:] = overview.valid[::-1].cumsum(axis=0).cumsum(axis=1)

    def span(starts: NDArray[np.float64], origin: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        first = np.floor((starts - origin) / px_m + 1e-6).astype(np.int64).clip(0, px - 1)
        last = np.ceil((starts + size - origin) / px_m - 1e-6).astype(np.int64).clip(0, px)
        return first, np.maximum(last, first + 1)

    (west, east), (south, north) = span(wests, overview.box[0]), span(souths, overview.box[1])
    upper, lower = sums[north], sums[south]
    inside = upper[:, east] - upper[:, west] - lower[:, east] + lower[:, west]
    return np.asarray(inside / np.outer(north - south, east - west), dtype=np.float64)


def _credits(sources: Sequence[dict[str, str]]) -> str:
    said = []
    for source in sources:
        text = source.get("attribution") or source.get("name") or ""
        licence = source.get("licence") or ""
        licence = f"licence {licence}" if licence.startswith("unknown") else licence
        credit = f"{text} ({licence})" if licence and licence not in text else text
        if credit and credit not in said:
            said.append(credit)
    return " · ".join(said)


def _wgs84(box: Box, crs: str) -> Box:
    from pyproj import Transformer

    found = Transformer.from_crs(crs, WGS84, always_xy=True).transform_bounds(*box)
    return (found[0], found[1], found[2], found[3])


def ground_text(metres: float) -> str:
    """Return a length for a caption: metres with at most three digits, kilometres above ten thousand."""
    if metres >= 10_000:
        return f"{metres / 1000:.3g} km"
    return f"{metres:,.0f} m" if metres >= 100 else f"{float(f'{metres:.2g}'):g} m"


def middle_text(box: Box, crs: str) -> str:
    """Return the middle of ``box`` in degrees."""
    west, south, east, north = _wgs84(box, crs)
    lat, lon = (south + north) / 2, (west + east) / 2
    digits = 4 if math.isfinite(lat) else 0
    return f"{abs(lat):.{digits}f}° {'S' if lat < 0 else 'N'}  {abs(lon):.{digits}f}° {'W' if lon < 0 else 'E'}"
