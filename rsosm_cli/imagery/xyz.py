"""The tiles of a service over a place -> one cloud-optimised GeoTIFF in the CRS of the tiles, pixel for pixel."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # what rasterio.shutil raises; there is no public name for it
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError

from rsosm_cli.errors import DiskError, SourceError, UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.imagery.missing import HALO_PX, missing_pixels
from rsosm_cli.imagery.present import LITTLE, little_image, no_image
from rsosm_cli.imagery.service import TileService
from rsosm_cli.imagery.tile_client import TileClient, decode
from rsosm_cli.imagery.tile_grid import MERCATOR, TileGrid
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import atomic, locked, require_space

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

DEFAULT_GSD_M = 0.6
# What a tile of aerial imagery weighs a pixel, for estimates: JPEG of quality 75 to 85.
_BYTES_PER_PX = 0.25
_MOST_TILES = 2_000_000
_BATCH = 4096
# Identical bytes: chance never makes two photographs agree, and four leave out a place that is merely listed twice.
_PLACEHOLDER_TILES = 4
_PROBES = 16
_LOWER_ZOOMS = 4
# A zoom is fine enough where its pixels are at most this multiple of the GSD: providers' zooms come in factors of 2.
_GSD_SLACK = 1.05


@dataclass(frozen=True)
class TileSet:
    """Tiles of one zoom over a place: columns and rows (N,) in reading order; ``tile_px`` as the service sends them."""

    zoom: int
    tile_px: int
    columns: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.columns)

    def ids(self) -> Iterator[tuple[int, int, int]]:
        return ((self.zoom, int(x), int(y)) for x, y in zip(self.columns, self.rows, strict=True))


@dataclass(frozen=True)
class Assembled:
    """What became of a service: the tiles, those missing, and what is to be said."""

    tiles: TileSet
    missing: list[str]
    notes: list[str]
    size_bytes: int


def zoom_for(gsd_m: float, tile_px: int, latitude: float, service: TileService | None = None) -> int:
    """Return the coarsest zoom whose pixels are no coarser than ``gsd_m`` (within 5 %), the finest where none is."""
    grid, last = (TileGrid(), 24) if service is None else (service.grid, service.max_zoom)
    zooms = range(0 if service is None or not grid.matrices else service.min_zoom, last)
    return next((z for z in zooms if grid.ground_px_m(z, tile_px, latitude) <= gsd_m * _GSD_SLACK), last)


def tiles_over(place: Geometry, zoom: int, tile_px: int, grid: TileGrid | None = None) -> TileSet:
    """Return the tiles that intersect ``place`` (WGS 84), row by row from the north."""
    import shapely

    grid = grid or TileGrid()
    limit = 85.05112878  # the square world ends there
    clipped = shapely.intersection(place, shapely.box(-180, -limit, 180, limit)) if grid.crs == MERCATOR else place
    local = reproject(np.array([clipped], dtype=object), WGS84, grid.crs)[0]
    matrix = grid.matrix(zoom)
    side = matrix.side
    west, south, east, north = shapely.bounds(local)
    x = np.arange(
        max(0, math.floor((west - matrix.left) / side)),
        min(matrix.columns - 1, math.floor((east - matrix.left) / side)) + 1,
    )
    first_row = max(0, math.floor((matrix.top - north) / side))
    last_row = min(matrix.rows - 1, math.floor((matrix.top - south) / side))
    if not len(x) or last_row < first_row:
        return TileSet(zoom, tile_px, np.empty(0, np.int64), np.empty(0, np.int64))
    if len(x) * (last_row - first_row + 1) > 50 * _MOST_TILES:
        raise _too_many(len(x) * (last_row - first_row + 1), zoom)
    shapely.prepare(local)
    columns, rows = [], []
    for y in range(first_row, last_row + 1):  # a row at a time, for memory
        left, top = x * side + matrix.left, matrix.top - y * side
        inside = shapely.intersects(local, shapely.box(left, top - side, left + side, top))
        columns.append(x[inside])
        rows.append(np.full(inside.sum(), y))
    tiles = TileSet(
        zoom, tile_px, np.concatenate(columns).astype(np.int64), np.concatenate(rows).astype(np.int64)
    )  # fmt: skip
    if len(tiles) > _MOST_TILES:
        raise _too_many(len(tiles), zoom)
    return tiles


def _too_many(tiles: int, zoom: int) -> UsageError:
    return UsageError(
        f"The place has {tiles:,} tiles at zoom {zoom}, more than the {_MOST_TILES:,} that are fetched at a time.",
        hint="Choose a coarser --gsd, a smaller place, or a raster of the provider.",
    )


def planned(service: TileService, place: Geometry, gsd_m: float | None, settings: FetchSettings) -> TileSet:
    """Return what would be fetched, without asking the service: tiles of 512 px where the address says so, else 256."""
    tile_px = service.grid.tile_px or (512 if "{r}" in service.unfilled or "@2x" in service.unfilled else 256)
    return tiles_over(place, _zoom(service, place, gsd_m, settings, tile_px), tile_px, service.grid)


def estimated_bytes(tiles: TileSet) -> int:
    return int(len(tiles) * tiles.tile_px**2 * _BYTES_PER_PX)


def _zoom(service: TileService, place: Geometry, gsd_m: float | None, settings: FetchSettings, tile_px: int) -> int:
    zoom = settings.xyz_zoom
    if zoom is None:
        zoom = zoom_for(gsd_m or DEFAULT_GSD_M, tile_px, place.centroid.y, service)
    elif not service.min_zoom <= zoom <= service.max_zoom:
        raise UsageError(f"{service.name} has zooms {service.min_zoom} to {service.max_zoom}, not {zoom}.")
    return min(max(zoom, service.min_zoom), service.max_zoom)


def fetch_tiles(
    service: TileService,
    place: Geometry,
    folder: Path,
    target: Path,
    *,
    gsd_m: float | None,
    settings: FetchSettings,
    progress: Progress = SILENT,
) -> Assembled:
    """Fetch the tiles of ``place`` (WGS 84) and write them to ``target``; tiles kept in ``folder`` are not asked again.

    Raises :class:`SourceError` where the service does not deliver or has nothing here.
    """
    client = TileClient(service, folder / f"xyz-{service.identity}", settings)
    log.info(
        "Imagery from %s: %s. Its terms of use apply to it and to what is derived from it.",
        service.name, service.attribution,
    )  # fmt: skip
    with locked(folder, "xyz.lock"):  # a second process waits, and finds the tiles here
        tiles, notes = _probed(client, place, gsd_m, settings)
        log.info(
            "%s tiles of zoom %d (%d px), about %.0f MB.",
            f"{len(tiles):,}", tiles.zoom, tiles.tile_px, estimated_bytes(tiles) / 1e6,
        )  # fmt: skip
        _download(client, tiles, settings.xyz_workers, progress)
        said = len(notes)
        missing = _missing(client, tiles, settings.xyz_placeholders, notes)
        if len(missing) == len(tiles):
            raise _all_placeholders(client, tiles, len(notes) - said)
        share = write_cog(client, tiles, missing, target, settings.nodata, service.attribution, progress)
    if share < LITTLE:
        notes.append(little_image(service.name, share))
    if missing:
        notes.append(f"{service.name} has no image for {len(missing)} of {len(tiles)} tiles.")
    kept = sum(client.path(*tile).stat().st_size for tile in tiles.ids())
    notes.append(f"Terms of use of {service.name}: {service.attribution}; check that they allow what you plan.")
    notes.append(f"{kept / 1e6:.0f} MB of tiles stay in {client.cache} for another run; they may be deleted.")
    ids = ["/".join(map(str, tile)) for tile in missing]
    return Assembled(tiles, ids, notes, target.stat().st_size)


def _nothing(service: TileService, zoom: int, lowest: int) -> SourceError:
    """Return the error where there is no tile at the zooms from ``zoom`` down to ``lowest``."""
    tried = f"zoom {zoom}" if zoom == lowest else f"zooms {lowest} to {zoom}"
    return SourceError(
        f"{service.name} has no tiles over the place at {tried}.", hint=f"Choose {_lower(service, lowest)}."
    )


def _all_placeholders(client: TileClient, tiles: TileSet, pictures: int) -> SourceError:
    service = client.service
    repeated = sum(client.path(*tile).stat().st_size > 0 for tile in tiles.ids())
    what = "one same picture" if pictures == 1 else f"the same {pictures} pictures"
    return SourceError(
        f"{service.name} has nothing but {what} over the place at zoom {tiles.zoom}, {repeated} times: its sign that "
        "there is no image.",
        hint=f"Keep it with --set xyz_placeholders=false, or choose {_lower(service, tiles.zoom)}.",
    )


def _lower(service: TileService, zoom: int) -> str:
    return (
        f"a lower zoom (--set xyz_zoom={zoom - 1}) or another service"
        if zoom > service.min_zoom
        else ("another service")
    )


def _probed(
    client: TileClient, place: Geometry, gsd_m: float | None, settings: FetchSettings
) -> tuple[TileSet, list[str]]:
    """Return the tiles to fetch, their size read from the first one that the service has.

    Without ``xyz_zoom`` a lower zoom is tried where the service has nothing at the one that meets the GSD.
    """
    service, latitude = client.service, place.centroid.y
    grid, assumed = service.grid, service.grid.tile_px or 256
    zoom = _zoom(service, place, gsd_m, settings, assumed)
    lowest = zoom if settings.xyz_zoom is not None else max(service.min_zoom, zoom - _LOWER_ZOOMS)
    wanted, size = zoom, None
    while (size := _probe(client, tiles_over(place, zoom, assumed, grid))) is None:
        if zoom <= lowest:
            raise _nothing(service, wanted, zoom)
        zoom -= 1
    if zoom == wanted:
        fitting = _zoom(service, place, gsd_m, settings, size)
        # Another size asks for another zoom, if the service has it.
        if fitting == zoom or _probe(client, tiles_over(place, fitting, size, grid)) is not None:
            zoom = fitting
    tiles = tiles_over(place, zoom, size, grid)
    ground = grid.ground_px_m(zoom, size, latitude)
    notes = [f"{len(tiles)} tiles of {service.name} at zoom {zoom}: {size} px, {ground:.3g} m a pixel on the ground."]
    if gsd_m is not None and ground > gsd_m * _GSD_SLACK:
        notes.append(f"{service.name} is coarser than the {gsd_m:g} m a pixel asked for.")
    return tiles, notes


def _probe(client: TileClient, tiles: TileSet) -> int | None:
    """Return the side in pixels of the first tile that the service has, of a few from the middle outwards."""
    order = np.argsort(
        np.hypot(tiles.columns - np.median(tiles.columns), tiles.rows - np.median(tiles.rows)), kind="stable"
    )
    picks = order if len(order) <= _PROBES else order[np.linspace(0, len(order) - 1, _PROBES).astype(int)]
    for i in picks:
        tile = (tiles.zoom, int(tiles.columns[i]), int(tiles.rows[i]))
        if client.fetch(*tile):
            _, height, width = decode(client.path(*tile).read_bytes()).shape
            if height != width:
                raise SourceError(f"{client.service.name} sends tiles of {width} x {height} pixels, not squares.")
            return width
    return None


def _download(client: TileClient, tiles: TileSet, workers: int, progress: Progress) -> None:
    """Fetch what is not kept yet, several at a time; the first failure stops all."""
    todo = [tile for tile in tiles.ids() if not client.kept(*tile)]
    failures: list[BaseException] = []

    def fetch(tile: tuple[int, int, int]) -> None:
        try:
            client.fetch(*tile)
        except BaseException as error:
            failures.append(error)  # before the stop: those that it ends come after the reason
            client.pace.stopped.set()
            raise

    with (
        progress.task(f"tiles of {client.service.name}", len(tiles), "tiles") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        advance(len(tiles) - len(todo))
        try:
            for start in range(0, len(todo), _BATCH):  # a future a tile would fill the memory of a large city
                for _ in pool.map(fetch, todo[start : start + _BATCH]):
                    advance(1)
        except BaseException:
            client.pace.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if failures:
                raise failures[0] from None
            raise


def _missing(client: TileClient, tiles: TileSet, placeholders: bool, notes: list[str]) -> list[tuple[int, int, int]]:
    """Return the tiles that the service does not have, with those that are its "no imagery here" picture."""
    sizes: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for tile in tiles.ids():
        sizes[client.path(*tile).stat().st_size].append(tile)
    missing = set(sizes.pop(0, []))
    if placeholders:
        for alike in sizes.values():
            if len(alike) < _PLACEHOLDER_TILES:
                continue
            same: dict[bytes, list[tuple[int, int, int]]] = defaultdict(list)
            for tile in alike:
                same[hashlib.sha256(client.path(*tile).read_bytes()).digest()].append(tile)
            for group in same.values():
                if len(group) >= _PLACEHOLDER_TILES:
                    missing.update(group)
                    first = "/".join(map(str, group[0]))
                    notes.append(
                        f"{len(group)} tiles are the very same picture ({first}) and are taken for missing "
                        "(--set xyz_placeholders=false keeps them)."
                    )
    return sorted(missing, key=lambda tile: (tile[2], tile[1]))


def write_cog(
    client: TileClient,
    tiles: TileSet,
    missing: Sequence[tuple[int, int, int]],
    target: Path,
    nodata: int | None,
    attribution: str,
    progress: Progress = SILENT,
) -> float:
    """Write tiles as a COG: red, green, blue, alpha (0 where there is no image), DEFLATE, overviews.

    Returns the share of the present tiles' pixels that are image; raises :class:`SourceError` where none is.
    GDAL's COG driver only copies, hence a plain tiled file first. Lossless, so that the pixels are those of the tiles.
    """
    px, grid = tiles.tile_px, client.service.grid
    matrix = grid.matrix(tiles.zoom)
    side = matrix.side
    absent = set(missing)
    present = [tile for tile in tiles.ids() if tile not in absent]
    columns, rows = [x for _, x, _ in present], [y for _, _, y in present]
    x0, y0 = min(columns), min(rows)
    width, height = (max(columns) - x0 + 1) * px, (max(rows) - y0 + 1) * px
    # The plain file, and the copy with its overviews: at worst as large, and a third more.
    require_space(target.parent, 4.0 * width * height * 2.4, f"The image of {width} x {height} pixels")
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": 4, "dtype": "uint8", "crs": grid.crs,
        "transform": Affine(
            side / px, 0.0, x0 * side + matrix.left, 0.0, -side / px, matrix.top - y0 * side
        ),
        "tiled": True, "blockxsize": min(px, 512) // 16 * 16 or 16, "blockysize": min(px, 512) // 16 * 16 or 16,
        "BIGTIFF": "YES", "SPARSE_OK": "TRUE", "photometric": "RGB",
    }  # fmt: skip
    plain = target.with_name(f".{target.name}.{os.getpid()}.plain.tif")
    target.parent.mkdir(parents=True, exist_ok=True)
    lossy, seen = False, 0
    try:
        with rasterio.Env(GDAL_CACHEMAX=128 * 2**20):
            with (
                rasterio.open(plain, "w", **profile) as image,
                progress.task("assembling tiles", len(present), "tiles") as advance,
            ):
                image.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
                image.update_tags(TIFFTAG_COPYRIGHT=attribution)
                for tile in present:
                    data = client.path(*tile).read_bytes()
                    lossy |= data[:4] != b"\x89PNG"
                    pixels = decode(data)
                    if pixels.shape != (4, px, px):
                        raise SourceError(
                            f"{client.service.name} sends tiles of different sizes: {px} px, and "
                            f"{pixels.shape[2]} px for {'/'.join(map(str, tile))}."
                        )
                    pixels[:3, pixels[3] == 0] = 0
                    seen += int(np.count_nonzero(pixels[3]))
                    top, left = (tile[2] - y0) * px, (tile[1] - x0) * px
                    image.write(pixels, window=((top, top + px), (left, left + px)))
                    advance(1)
            if nodata is not None:
                seen = _mark_missing(plain, nodata, lossy)
            if not seen:
                raise no_image(client.service.name)
            with atomic(target) as part:
                rasterio.shutil.copy(
                    plain, part, driver="COG", COMPRESS="DEFLATE", PREDICTOR="YES", BIGTIFF="IF_SAFER",
                    OVERVIEW_RESAMPLING="AVERAGE", NUM_THREADS="2",
                )  # fmt: skip
    except (RasterioError, CPLE_BaseError) as error:
        detail = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise DiskError(
            f"{target.name} was not written: {detail}.",
            hint="Is the disk full? Free some space and run the command again: the tiles fetched are kept.",
            path=str(target),
        ) from error
    finally:
        plain.unlink(missing_ok=True)
    return seen / (len(present) * px * px)


def _mark_missing(plain: Path, value: int, lossy: bool) -> int:
    """Set alpha to 0 where the image is missing by its colour, strip by strip; return how many pixels are image."""
    seen = 0
    with rasterio.open(plain, "r+") as image:
        for top in range(0, image.height, 512):
            bottom = min(top + 512, image.height)
            first, last = max(0, top - HALO_PX), min(image.height, bottom + HALO_PX)
            pixels = image.read((1, 2, 3), window=((first, last), (0, image.width)))
            gone = missing_pixels(pixels, value, lossy)[top - first : bottom - first]
            window = ((top, bottom), (0, image.width))
            alpha = image.read(4, window=window)
            alpha[gone] = 0
            seen += int(np.count_nonzero(alpha))
            image.write(alpha, 4, window=window)
    return seen
