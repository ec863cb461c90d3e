"""Imagery of a city from whatever the user names: raster files, folders, tile services -> ``imagery.tif``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.imagery.bands import check_bands, doubtful_alpha, same_bands
from rsosm_cli.imagery.checks import check_sources, unused_gsd
from rsosm_cli.imagery.described import find_service
from rsosm_cli.imagery.mosaic import write_mosaic
from rsosm_cli.imagery.present import image_share
from rsosm_cli.imagery.raster import Raster, inspect
from rsosm_cli.imagery.service import TileService, is_tile_service
from rsosm_cli.imagery.sources import is_remote, raster_paths
from rsosm_cli.imagery.stac import compose, is_stac
from rsosm_cli.imagery.stac_search import search
from rsosm_cli.imagery.stretch import Stretch, is_stretched
from rsosm_cli.imagery.tile_grid import MERCATOR
from rsosm_cli.imagery.whole import check_whole, made_of
from rsosm_cli.imagery.xyz import estimated_bytes, fetch_tiles, planned
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.units import size
from rsosm_cli.workspace import atomic, fingerprint, write_json

if TYPE_CHECKING:
    from shapely import Geometry

# Tiles of the grid reach beyond the place by less than their side (134 m by default).
MARGIN_M = 200.0
_METRES_PER_DEGREE = 111_320.0
_WHOLE = 0.995  # share of the place from which imagery covers it
_NEARLY = 0.95  # the same of pixels that are image, estimated in windows that reach beyond the place
_UNKNOWN_LICENCE = "unknown: supplied by the user"


@dataclass(frozen=True)
class ImageryInfo:
    """What ``imagery.tif`` is made of.

    ``kind``: ``vrt`` (a mosaic over the user's own files) or ``cog`` (downloaded). ``bands``: alpha aside.
    ``count``: rasters or tiles in it. ``sources``: name, licence, attribution of each. ``missing``: tiles that the
    service does not have. ``size_bytes``: of what was written (planned: estimated download). ``stretch``: (low, high)
    of each band that became 0 and 255, where the rasters are not 8-bit. ``nodata``: value that was taken for missing.
    ``chosen``: the rasters' bands that became these, in order; None: all.
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
    chosen: tuple[int | str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what is recorded: not the path, as what lies beside the image may be moved with it."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


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

    A source is a raster, a folder or a pattern of rasters (``photos/*.tif``), a tile template
    (``https://host/{z}/{x}/{y}.jpg``, see :mod:`rsosm_cli.imagery.service`) or a service's name in xyzservices
    (``Esri.WorldImagery``). One service alone becomes a COG; everything else a VRT over the rasters. What ``target``
    needs besides the user's files is kept in ``folder/imagery`` (the stem of ``target``), with ``info.json``: this
    function's answer. ``settings.bands`` chooses among the bands of rasters.

    ``gsd_m``: metres on the ground a pixel that a service's zoom must meet. With ``dry_run`` nothing is written
    and no tile or pixel is asked for; descriptions (WMTS, TMS), catalogues (STAC) and headers of rasters are read.
    Raises :class:`SourceError`, :class:`MissingError` or :class:`UsageError`.
    """
    if not sources:
        raise UsageError("No imagery is named.", hint="Give a raster, a folder or a tile service: --imagery SOURCE")
    check_sources(sources, settings)
    services = {s: None if is_stac(s) else find_service(s, settings) for s in sources}
    found = [service for service in services.values() if service is not None]
    paths = [
        path for source in sources if services[source] is None and not is_stac(source) for path in raster_paths(source)
    ]
    for path in paths:
        _refuse_own(path, target)
    catalogues = [source for source in sources if is_stac(source)]
    parts = folder / target.stem
    if dry_run:
        return _planned(paths, found, catalogues, place_geometry_wgs84, target, gsd_m, settings)
    wide = place_margin(place_geometry_wgs84)
    notes: list[str] = []
    missing: list[str] = []
    credits_: list[dict[str, str]] = []
    tiles = 0
    downloaded: dict[str, str] = {}
    for source, service in services.items():
        if service is None:
            continue
        single = len(services) == 1
        image = target if single else parts / f"xyz-{service.identity}.tif"
        made = fetch_tiles(service, wide, parts, image, gsd_m=gsd_m, settings=settings, progress=progress)
        notes += made.notes
        missing += made.missing
        tiles += len(made.tiles) - len(made.missing)
        credits_.append(_service_credit(service))
        if single:
            info = ImageryInfo(
                target, "cog", service.grid.crs, 3, tiles, tuple(notes), credits_, missing, made.size_bytes, None,
                settings.nodata,
            )  # fmt: skip
            write_json(parts / "info.json", info.as_dict())
            return info
        downloaded[source] = str(image.resolve())
    for source in catalogues:
        image = parts / f"stac-{fingerprint(source)}.tif"
        composed = compose(source, wide, parts, image, gsd_m=gsd_m, settings=settings, progress=progress)
        notes += composed.notes
        credits_.append(composed.credit)
        downloaded[source] = str(image.resolve())
        tiles += composed.images
    # In the order given: where rasters overlap, the later one is on top.
    ordered = [
        p for source in services for p in ([downloaded[source]] if source in downloaded else raster_paths(source))
    ]
    rasters, said = _meeting(_inspected(ordered, _chosen(sources, settings), settings.nodata), place_geometry_wgs84)
    notes += said
    rasters, said = same_bands(rasters)
    notes += said + doubtful_alpha(rasters)
    if not downloaded:
        notes += unused_gsd(gsd_m)
    with atomic(target) as part:  # what holds no image takes no image's place
        mosaic = write_mosaic(rasters, parts, part, nodata=settings.nodata, progress=progress)
        share = image_share(part, rasters, place_geometry_wgs84, nodata=settings.nodata, stretch=mosaic.stretch)
    notes += _covering(covered(rasters, place_geometry_wgs84), share)
    if mosaic.warped:
        warped = f"{mosaic.warped} of {len(rasters)} rasters" if len(rasters) > 1 else "The raster"
        verb = "is" if mosaic.warped == 1 else "are"
        notes.append(f"{warped} {verb} resampled to the grid of the imagery ({mosaic.crs}) when read.")
    if mosaic.stretch is not None:
        notes.append(_stretched(rasters))
    own = [r for r in rasters if r.path not in downloaded.values()]
    info = ImageryInfo(
        target, "vrt", mosaic.crs, mosaic.bands, len(own) + tiles, tuple(notes), [*_credits(own), *credits_], missing,
        target.stat().st_size, mosaic.stretch, settings.nodata, settings.bands,
    )  # fmt: skip
    write_json(parts / "info.json", info.as_dict())
    return info


def _refuse_own(path: str, target: Path) -> None:
    """Raise :class:`UsageError` where an image of the city would be made of itself, or of another that may change."""
    if not Path(path).is_file():
        return
    images = {target.resolve(), *(image.resolve() for image in target.parent.glob("imagery*.tif"))}
    for file in (path, *sorted(made_of(path))):
        if Path(file).resolve() in images:
            raise UsageError(
                f"{target.name} cannot be made of {file}, which is an image of the city as fetch makes it.",
                hint="Name what that was made of, or a copy elsewhere.",
            )


def check_own_rasters(sources: Sequence[str], settings: FetchSettings) -> None:
    """Refuse local rasters that cannot be read or are cut off, or that lack the bands or the nodata value asked for.

    Raises :class:`UsageError`, :class:`MissingError`, :class:`SourceError`; no address is opened.
    """
    own = [s for s in sources if not is_stac(s) and not is_tile_service(s) and not is_remote(s)]
    paths = [path for source in own for path in raster_paths(source) if not path.startswith("/vsi")]
    _inspected(paths, _chosen(sources, settings), settings.nodata)


def _chosen(sources: Sequence[str], settings: FetchSettings) -> tuple[int | str, ...] | None:
    """Return the bands to take of rasters; all of them where STAC is among the sources: the names are of its assets."""
    return None if any(map(is_stac, sources)) else settings.bands


def _check_nodata(value: int | None, name: str, dtype: str) -> None:
    """Raise :class:`UsageError` where no pixel can have the value that stands for missing image."""
    if value is None or not np.issubdtype(dtype, np.integer):
        return
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if not low <= value <= high:
        raise UsageError(
            f"--nodata {value} is no value of {name}, whose pixels are {dtype}: {low} to {high}.",
            hint="Leave it out, or give the value that its missing pixels have (white: 255, black: 0).",
        )


def _inspected(paths: Sequence[str], bands: Sequence[int | str] | None, nodata: int | None) -> list[Raster]:
    """Return what the rasters are, each with the bands wanted (counted from 1, alpha aside) in the order wanted.

    One that is cut off, or lacks what is asked for, is refused.
    """
    rasters = [inspect(path) for path in paths]
    for raster in rasters:
        check_whole(raster.path)
        _check_nodata(nodata, raster.path, raster.dtype)
    if bands is None:
        return rasters
    numbers = [int(band) for band in bands]
    for raster in rasters:
        check_bands(raster.path, raster.clear or len(raster.bands), numbers)
    return [raster.with_bands(numbers) for raster in rasters]


def _planned(
    paths: Sequence[str],
    services: Sequence[TileService],
    catalogues: Sequence[str],
    place: Geometry,
    target: Path,
    gsd_m: float | None,
    settings: FetchSettings,
) -> ImageryInfo:
    """Return what would be made, with the estimated download in ``size_bytes``."""
    own = _inspected(paths, _chosen(catalogues, settings), settings.nodata)
    rasters, notes = _meeting(own, place) if own else ([], [])
    if paths:
        rasters, said = same_bands(rasters, pictures=bool(services or catalogues))
        notes += said
    if not services and not catalogues:
        notes += _covering(covered(rasters, place)) + unused_gsd(gsd_m)
    count, total = len(rasters), 0
    for service in services:
        tiles = planned(service, place_margin(place), gsd_m, settings)
        notes.append(
            f"{len(tiles):,} tiles of {service.name} at zoom {tiles.zoom}, if they have {tiles.tile_px} px: "
            f"about {size(estimated_bytes(tiles))} to download."
        )
        count += len(tiles)
        total += estimated_bytes(tiles)
    for source in catalogues:
        found = search(source, place_margin(place), settings)
        credit = found.credit["name"]
        notes.append(f"{len(found.items)} images of {credit} meet the place; the least cloudy is {found.items[0].id}.")
        notes += found.notes
        count += len(found.items)
    single = not rasters and not catalogues and len(services) == 1
    crs = rasters[0].crs if rasters else services[0].grid.crs if services else MERCATOR
    bands = min([len(r.bands) for r in rasters] + [3] * (len(services) + len(catalogues)))
    return ImageryInfo(
        target, "cog" if single else "vrt", crs, bands, count, tuple(notes),
        [*_credits(rasters), *map(_service_credit, services)], [], total, None, settings.nodata,
    )  # fmt: skip


def _service_credit(service: TileService) -> dict[str, str]:
    return {"name": service.name, "licence": service.licence, "attribution": service.attribution}


def place_margin(place: Geometry, metres: float = MARGIN_M) -> Geometry:
    """Return ``place`` (WGS 84) widened by ``metres`` on the ground."""
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
    return kept, notes


def _covering(reached: float, share: float = 1.0) -> list[str]:
    """Return what is to be said of imagery that reaches over a share of the place, and is image in a share of that."""
    if share < _NEARLY:
        covers = f"some {100 * reached * share:.2g} % of the place; the rest of its pixels there are missing (nodata)"
    elif reached < _WHOLE:
        covers = f"{100 * reached:.0f} % of the place"
    else:
        return []
    return [f"The imagery covers {covers}."]


def covered(rasters: Sequence[Raster], place: Geometry) -> float:
    """Return the share of ``place`` (WGS 84) that lies within the bounds of ``rasters``, 0 to 1."""
    import shapely

    boxes = shapely.box(*zip(*[r.bounds_wgs84() for r in rasters], strict=True))
    return float(shapely.area(shapely.intersection(place, shapely.union_all(boxes))) / max(place.area, 1e-30))


def _stretched(rasters: Sequence[Raster]) -> str:
    plain = sum(not is_stretched(raster) for raster in rasters)
    done = "percentiles 2 to 98 of each band are stretched to 0 to 255."
    if not plain:
        return f"The rasters are not 8-bit: {done}"
    return (
        f"{plain} of {len(rasters)} rasters {'is' if plain == 1 else 'are'} 8-bit and taken as "
        f"{'it is' if plain == 1 else 'they are'}; of the others, {done}"
    )


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
