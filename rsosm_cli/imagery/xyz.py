"""The tiles of a service over a place -> one cloud-optimised GeoTIFF in the CRS of the tiles, pixel for pixel."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.imagery.cog import write_cog
from rsosm_cli.imagery.present import LITTLE, little_image
from rsosm_cli.imagery.service import TileService
from rsosm_cli.imagery.tile_client import Tile, TileClient, decode
from rsosm_cli.imagery.tile_set import GSD_SLACK, TileSet, tiles_over, zoom_for
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.units import size
from rsosm_cli.workspace import locked

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

DEFAULT_GSD_M = 0.6
# What a tile of aerial imagery weighs a pixel, for estimates: JPEG of quality 75 to 85.
_BYTES_PER_PX = 0.25
_BATCH = 4096
# Identical bytes: chance never makes two photographs agree, and four leave out a place that is merely listed twice.
_PLACEHOLDER_TILES = 4
_PROBES = 16
_LOWER_ZOOMS = 4


@dataclass(frozen=True)
class Assembled:
    """What became of a service: the tiles, those missing, and what is to be said."""

    tiles: TileSet
    missing: list[str]
    notes: list[str]
    size_bytes: int


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
            "%s tiles of zoom %d (%d px), about %s.",
            f"{len(tiles):,}", tiles.zoom, tiles.tile_px, size(estimated_bytes(tiles)),
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
    notes += _doubts(client, missing)
    kept = sum(client.size(*tile) for tile in tiles.ids())
    notes.append(f"Terms of use of {service.name}: {service.attribution}; check that they allow what you plan.")
    where = f"{folder.name}/{client.cache.name}"  # recorded: the city's folder may be moved
    notes.append(f"{size(kept)} of tiles stay in the city's {where} for another run; they may be deleted.")
    ids = ["/".join(map(str, tile)) for tile in missing]
    return Assembled(tiles, ids, notes, target.stat().st_size)


def _doubts(client: TileClient, missing: Collection[Tile]) -> list[str]:
    """Return sentences on tiles that are missing by an answer that may mean something else."""
    refused, empty = (len(tiles.intersection(missing)) for tiles in (client.refused, client.empty))
    said = []
    if refused:
        said.append(f"{refused} of them were refused with status 403, as S3 does, while others were delivered")
    if empty:
        said.append(f"{empty} of them came as an empty answer, twice")
    return [f"{text}: they are taken for missing, and asked for again with --force." for text in said]


def _nothing(service: TileService, zoom: int, lowest: int) -> SourceError:
    """Return the error where there is no tile at the zooms from ``zoom`` down to ``lowest``."""
    tried = f"zoom {zoom}" if zoom == lowest else f"zooms {lowest} to {zoom}"
    return SourceError(
        f"{service.name} has no tiles over the place at {tried}.", hint=f"Choose {_lower(service, lowest)}."
    )


def _all_placeholders(client: TileClient, tiles: TileSet, pictures: int) -> SourceError:
    service = client.service
    repeated = sum(client.size(*tile) > 0 for tile in tiles.ids())
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
    wanted, side = zoom, None
    while (side := _probe(client, tiles_over(place, zoom, assumed, grid))) is None:
        if zoom <= lowest:
            raise _nothing(service, wanted, zoom)
        zoom -= 1
    if zoom == wanted:
        fitting = _zoom(service, place, gsd_m, settings, side)
        # Another size asks for another zoom, if the service has it.
        if fitting == zoom or _probe(client, tiles_over(place, fitting, side, grid)) is not None:
            zoom = fitting
    tiles = tiles_over(place, zoom, side, grid)
    ground = grid.ground_px_m(zoom, side, latitude)
    notes = [f"{len(tiles)} tiles of {service.name} at zoom {zoom}: {side} px, {ground:.3g} m a pixel on the ground."]
    if gsd_m is not None and ground > gsd_m * GSD_SLACK:
        notes.append(f"{service.name} is coarser than the {gsd_m:g} m a pixel asked for.")
    return tiles, notes


def _probe(client: TileClient, tiles: TileSet) -> int | None:
    """Return the side in pixels of the first tile that the service has, of a few from the middle outwards."""
    order = np.argsort(
        np.hypot(tiles.columns - np.median(tiles.columns), tiles.rows - np.median(tiles.rows)), kind="stable"
    )
    picks = order if len(order) <= _PROBES else order[np.linspace(0, len(order) - 1, _PROBES).astype(int)]
    todo = [(tiles.zoom, int(tiles.columns[i]), int(tiles.rows[i])) for i in picks]
    for _ in range(2):
        for tile in todo:
            if client.fetch(*tile):
                _, height, width = decode(client.path(*tile).read_bytes()).shape
                if height != width:
                    raise SourceError(f"{client.service.name} sends tiles of {width} x {height} pixels, not squares.")
                return width
        if not (todo := client.doubtful(todo)):
            break
    client.confirm()
    return None


def _download(client: TileClient, tiles: TileSet, workers: int, progress: Progress) -> None:
    """Fetch what is not kept yet, several at a time; the first failure stops all."""
    todo = [tile for tile in tiles.ids() if not client.kept(*tile)]
    failures: list[BaseException] = []

    def fetch(tile: Tile) -> None:
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
            again = client.doubtful(todo)
            for start in range(0, len(again), _BATCH):
                list(pool.map(fetch, again[start : start + _BATCH]))
            client.confirm()
        except BaseException as error:
            client.pace.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if failures and isinstance(error, Exception):  # an interruption ends the threads with errors, too
                raise failures[0] from None
            raise


def _missing(client: TileClient, tiles: TileSet, placeholders: bool, notes: list[str]) -> list[Tile]:
    """Return the tiles that the service does not have, with those that are its "no imagery here" picture."""
    sizes: dict[int, list[Tile]] = defaultdict(list)
    for tile in tiles.ids():
        sizes[client.size(*tile)].append(tile)
    missing = set(sizes.pop(0, []))
    if placeholders:
        for alike in sizes.values():
            if len(alike) < _PLACEHOLDER_TILES:
                continue
            same: dict[bytes, list[Tile]] = defaultdict(list)
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
