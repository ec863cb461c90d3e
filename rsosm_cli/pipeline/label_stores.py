"""The tile stores that folders of labels bring with them, and those of two dates of a city."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import Progress
from rsosm_cli.settings import BuildSettings, TaskSettings, resolve
from rsosm_cli.workspace import Workspace, file_stamp, fingerprint, locked, slug

if TYPE_CHECKING:
    from rsosm_cli.tiles.folders import LabelFolder

log = logging.getLogger("rsosm")

# Tiles a part of a store of two dates: bounds memory.
TILES_A_PART = 256


def stores_of_folders(
    space: Workspace, folders: Sequence[LabelFolder], tile_px: int, gsd_m: float, progress: Progress, *,
    dry_run: bool = False,
) -> list[tuple[str, Path | None]]:  # fmt: skip
    """Return (name, store) of folders of labels, made under ``<root>/folders`` where they are not there yet.

    A ``dry_run`` makes none: in place of one that is missing stands None.
    """
    return [(folder.path.name, _store_of(space, folder, tile_px, gsd_m, progress, dry_run)) for folder in folders]


def _store_of(
    space: Workspace, folder: LabelFolder, tile_px: int, gsd_m: float, progress: Progress, dry_run: bool
) -> Path | None:
    home = space.root / "folders"
    if folder.layout == "chips":
        from rsosm_cli.pipeline.build_graph import build_graph

        # The chips' own size: label images are of it.
        built: Result = build_graph(
            chips=folder.path, output=home / f"{slug(folder.path.name)}.h5", root=space.root, progress=progress,
            settings=resolve(BuildSettings, options={"grid.tile": tile_px, "grid.stride": tile_px}), dry_run=dry_run,
        )  # fmt: skip
        return None if built.status == "planned" else Path(next(iter(built.paths.values())))
    from rsosm_cli.tiles.folders import folder_store

    path = home / f"{slug(folder.path.name)}-{folder.key(tile_px)[:8]}.h5"
    if dry_run:
        return path if path.exists() else None
    with locked(home, f"{path.name}.lock"):
        if not path.exists():
            with progress.task(f"images of {folder.path.name}", len(folder.items), "images") as advance:
                folder_store(folder, path, tile_px, gsd_m, advance)
            _remove_parts(path)
    return path


def dated_cities(space: Workspace, epochs: tuple[str, str]) -> list[str]:
    """Return the cities that have tiles and the images of both dates; raises :class:`MissingError` where none has."""
    from rsosm_cli.pipeline.map import epoch_image

    found, lacking = [], None
    for files in space.cities():
        if not files.tiles.exists():
            continue
        try:
            for epoch in epochs:
                epoch_image(files, epoch, files.imagery)
        except MissingError as error:
            lacking = lacking or error
            continue
        found.append(files.name)
    if not found:
        raise lacking or MissingError(
            f"There are no tiles under {space.root}.", hint="Run `rsosm build-graph --city NAME` first."
        )
    return found


def pair_store(
    space: Workspace, city: str, epochs: tuple[str, str], progress: Progress, *, dry_run: bool = False
) -> Path | None:
    """Return the store of a city's tiles with the images of two dates, made where it is not there yet.

    Grid, graphs and bands are those of the city's ``tiles.h5``. A ``dry_run`` makes none, and returns None where it is
    missing. Raises :class:`MissingError` for what is not there.
    """
    from rsosm_cli.geometry import PixelBounds, Projection
    from rsosm_cli.imagery.reader import ImageReader
    from rsosm_cli.inference.pair import ImagePair
    from rsosm_cli.pipeline.map import epoch_image
    from rsosm_cli.tiles.parts import assemble, image_part, write_part
    from rsosm_cli.tiles.store import TileStore

    files = space.city(city)
    space.tiles_of(city)
    images = [epoch_image(files, epoch, files.imagery) for epoch in epochs]
    key = fingerprint("pair", 1, file_stamp(files.tiles), [file_stamp(path) for path in images])
    path = files.folder / f"tiles-{slug('-'.join(e or 'now' for e in epochs))}-{key[:8]}.h5"
    if dry_run:
        return path if path.exists() else None
    with locked(files.folder, f"{path.name}.lock"):
        if path.exists():
            return path
        store = TileStore.open(files.tiles)
        if store.gsd_m is None:
            raise UsageError(f"{files.tiles} has tiles of different sizes.", hint="Build the city's tiles again.")
        bands = tuple(store.bands)
        grid = Projection(store.crs, store.gsd_m)
        settings = store.settings.model_copy(update={"bands": (*bands, *(b + max(bands) for b in bands))})
        tags = list(zip(store.tags, store.tag_keys, strict=True))
        parts = []
        with (
            ImageReader(images[0], bands) as before,
            ImageReader(images[1], bands) as after,
            progress.task(f"tiles of two dates: {city}", len(store), "tiles") as advance,
        ):
            pair = ImagePair(before, after)
            for start in range(0, len(store), TILES_A_PART):
                tiles = np.arange(start, min(start + TILES_A_PART, len(store)))
                part = path.with_name(f".{path.stem}.parts") / f"block-{start // TILES_A_PART:05d}.npz"
                part.parent.mkdir(parents=True, exist_ok=True)
                parts.append(part)
                share = np.zeros(len(tiles), np.float32)
                with image_part(part, len(tiles), (2 * len(bands), store.tile_px, store.tile_px)) as out:
                    for i, (west, _, _, north) in enumerate(store.bounds_m[tiles].tolist()):
                        col, row = round(west / grid.gsd_m), round(-north / grid.gsd_m)
                        pixels, known = pair.read(grid, PixelBounds(col, row, col + store.tile_px, row + store.tile_px))
                        share[i] = known.mean()
                        out.append((pixels * known).astype(np.uint8)[None])
                        advance(1)
                write_part(
                    part, store.graphs(tiles), tags, cells=store.cells[tiles], bounds_m=store.bounds_m[tiles],
                    image_share=share, numbers={},
                )  # fmt: skip
        assemble(
            path, parts, settings=settings, crs=store.crs, gsd_m=store.gsd_m, has_images=True,
            provenance={**store.provenance, "epochs": list(epochs)},
        )  # fmt: skip
        _remove_parts(path)
    return path


def _remove_parts(path: Path) -> None:
    import shutil

    shutil.rmtree(path.with_name(f".{path.stem}.parts"), ignore_errors=True)


def check_kind(task: TaskSettings, folders: Sequence[LabelFolder]) -> None:
    """Raise :class:`UsageError` where a task cannot be learnt from folders of these layouts."""
    for folder in folders:
        if (folder.layout == "pairs") != (task.kind == "change"):
            what = "pairs of images" if folder.layout == "pairs" else "single images"
            raise UsageError(
                f"{folder.path} holds {what}, and {task.name} is a {task.kind} task.",
                hint="Choose a task of the kind change for pairs, another one for single images.",
            )
        if folder.layout != "chips" and task.modality != "image":
            raise UsageError(
                f"{folder.path} holds images without OSM objects, and the modality is {task.modality}.",
                hint="Give --modality image.",
            )
