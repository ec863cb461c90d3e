"""Imagery of a city from whatever the user names: raster files, folders, tile services -> ``imagery.tif``."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.imagery.mosaic import write_mosaic
from rsosm_cli.imagery.raster import Raster, Stretch, inspect
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import write_json

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

# Files that a folder of imagery is searched for.
SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".webp")
# Tiles of the grid reach beyond the place by less than their side (134 m by default).
MARGIN_M = 200.0
_METRES_PER_DEGREE = 111_320.0
_UNKNOWN_LICENCE = "unknown: supplied by the user"


@dataclass(frozen=True)
class ImageryInfo:
    """What ``imagery.tif`` is made of.

    ``kind``: ``vrt`` (a mosaic over the user's own files) or ``cog`` (downloaded). ``bands``: alpha aside.
    ``count``: rasters or tiles in it. ``sources``: name, licence, attribution of each. ``missing``: tiles that the
    service does not have. ``size_bytes``: of what was written (planned: estimated download). ``stretch``: (low, high)
    of each band that became 0 and 255, where the rasters are not 8-bit. ``nodata``: value that was taken for missing.
    """

    path: Path
    kind: Literal["vrt", "cog"]
    crs: str
    bands: int
    count: int
    notes: tuple[str, ...]
    sources: list[dict[str, str]]
    missing: list[str]
    size_bytes: int
    stretch: Stretch | None = None
    nodata: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def prepare_imagery(
    sources: Sequence[str],
    place_geometry_wgs84: Geometry,
    folder: Path,
    target: Path,
    *,
    gsd_m: float | None,
    settings: FetchSettings,
    progress: Progress = SILENT,
    dry_run: bool = False,
) -> ImageryInfo:
    """Make ``target`` (``imagery.tif``) of a place from ``sources``; ``folder`` is the city's.

    A source is a raster, a folder or a pattern of rasters (``photos/*.tif``). What ``target`` needs besides the user's
    files is kept in ``folder/imagery``, with ``info.json``: this function's answer. With ``dry_run`` nothing is
    written. Raises :class:`SourceError`, :class:`MissingError` or :class:`UsageError`.
    """
    if not sources:
        raise UsageError("No imagery is named.", hint="Give a raster, a folder or a tile service: --imagery SOURCE")
    paths = [path for source in sources for path in raster_paths(source)]
    rasters, notes = _meeting([inspect(path) for path in paths], place_geometry_wgs84)
    parts = folder / "imagery"
    if dry_run:
        return ImageryInfo(
            target, "vrt", rasters[0].crs, min(len(r.bands) for r in rasters), len(rasters), tuple(notes),
            _credits(rasters), [], 0, None, settings.nodata,
        )  # fmt: skip
    mosaic = write_mosaic(rasters, parts, target, nodata=settings.nodata, progress=progress)
    if mosaic.warped:
        notes.append(f"{mosaic.warped} of {len(rasters)} rasters are reprojected to {mosaic.crs} when read.")
    if mosaic.stretch is not None:
        notes.append("The rasters are not 8-bit: percentiles 2 to 98 of each band are stretched to 0 to 255.")
    info = ImageryInfo(
        target, "vrt", mosaic.crs, mosaic.bands, len(rasters), tuple(notes), _credits(rasters), [],
        target.stat().st_size, mosaic.stretch, settings.nodata,
    )  # fmt: skip
    write_json(parts / "info.json", info.as_dict())
    return info


def raster_paths(source: str) -> list[str]:
    """Return the rasters that a source names: itself, those of a folder, or those of a pattern; absolute paths."""
    if source.startswith("/vsi") or "://" in source:
        return [source]
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise MissingError(f"There is no raster in {path}.", hint=f"Looked for {', '.join(SUFFIXES)}.")
        return [str(p.resolve()) for p in found]
    if not path.exists() and glob.has_magic(source):
        matches = sorted(glob.glob(os.path.expanduser(source)))
        if not matches:
            raise MissingError(f"No raster matches {source}.")
        return [str(Path(p).resolve()) for p in matches]
    if not path.exists():
        raise MissingError(
            f"There is no raster {source}.",
            hint="Imagery is a raster, a folder, a pattern, a template with {x}, {y} and {z}, or a service's name.",
        )
    return [str(path.resolve())]


def place_margin(place: Geometry, metres: float = MARGIN_M) -> Geometry:
    """Return ``place`` (WGS 84) widened by ``metres`` on the ground."""
    import math

    import shapely

    # Widened in degrees of latitude after shrinking the longitudes: an ellipse in degrees is a circle on the ground.
    shrink = max(0.05, math.cos(math.radians(shapely.centroid(place).y)))
    scaled = shapely.transform(place, lambda xy: xy * (shrink, 1.0))
    wide = shapely.buffer(scaled, metres / _METRES_PER_DEGREE, quad_segs=4)
    return shapely.transform(wide, lambda xy: xy / (shrink, 1.0))


def _meeting(rasters: list[Raster], place: Geometry) -> tuple[list[Raster], list[str]]:
    """Return the rasters near the place, and a note on those that are not; raises where none meets the place."""
    import shapely

    boxes = shapely.box(*zip(*[r.bounds_wgs84() for r in rasters], strict=True))
    if not shapely.intersects(boxes, place).any():
        west, south, east, north = shapely.total_bounds(boxes)
        p = shapely.bounds(place)
        what = rasters[0].path if len(rasters) == 1 else f"None of the {len(rasters)} rasters"
        verb = "does not meet" if len(rasters) == 1 else "meets"
        raise SourceError(
            f"{what} {verb} the place: imagery at {west:.4f}, {south:.4f}, {east:.4f}, {north:.4f}, "
            f"place at {p[0]:.4f}, {p[1]:.4f}, {p[2]:.4f}, {p[3]:.4f} (west, south, east, north).",
            hint="Choose imagery of this city, or check the raster's coordinate reference system.",
        )
    near = shapely.intersects(boxes, place_margin(place))
    kept = [r for r, inside in zip(rasters, near, strict=True) if inside]
    notes = []
    if len(kept) < len(rasters):
        notes.append(f"{len(rasters) - len(kept)} of {len(rasters)} rasters lie outside the place and are left out.")
    share = shapely.area(shapely.intersection(place, shapely.union_all(boxes[near]))) / max(shapely.area(place), 1e-30)
    if share < 0.995:
        notes.append(f"The imagery covers {100 * share:.0f} % of the place.")
    return kept, notes


def _credits(rasters: Sequence[Raster]) -> list[dict[str, str]]:
    """Return name, licence and attribution, one entry for all rasters that agree in them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for raster in rasters:
        groups.setdefault((raster.licence, raster.attribution), []).append(Path(raster.path).name)
    found = []
    for (licence, attribution), names in groups.items():
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        found.append({"name": name, "licence": licence or _UNKNOWN_LICENCE, "attribution": attribution})
    return found
