"""Whether tiles fit the encoder that a task starts from, and how they are fed to it."""

from __future__ import annotations

from rsosm_cli.errors import UsageError
from rsosm_cli.models.checkpoint import Description
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.shards import TileShards

# Relative differences of a tile's side, and of its pixels, that are not worth a word.
SAME_GROUND, SAME_GSD = 0.02, 0.25


def fit_inputs(shards: TileShards, description: Description, task: TaskSettings) -> tuple[int, float, list[str]]:
    """Return the size (px) and GSD (m) at which the encoder is fed with the tiles, and what should be said of it.

    Tiles of the ground that the encoder was pretrained on are resized to its pixels; others are fed as they are.
    Raises :class:`UsageError` where the bands do not fit.
    """
    notes = []
    wanted = task.images * description.model.in_chans
    if len(shards.bands) != wanted and task.modality != "osm":
        if task.images == 2 and len(shards.bands) == description.model.in_chans:
            raise UsageError(
                f"The tiles have images of one date, and the task {task.name} compares two.",
                hint="Name two dates: --from 2019 --to 2023, without --tiles; or give a folder of image pairs.",
            )
        both = " (of two dates)" if task.images == 2 else ""
        raise UsageError(
            f"The tiles have {len(shards.bands)} bands, and the checkpoint takes {wanted}{both}.",
            hint="Build tiles with the bands of the checkpoint, or choose another --checkpoint.",
        )
    if shards.vector_width and shards.vector_width != description.text.width and task.modality != "image":
        raise UsageError(
            f"The tiles carry ready node vectors of width {shards.vector_width}, and the checkpoint's text model gives "
            f"{description.text.width}.",
            hint="Choose a checkpoint with that text model, --modality image, or --protocol scratch.",
        )
    first = shards.bands[: len(shards.bands) // task.images]
    if tuple(first) != tuple(description.bands) and task.modality != "osm":
        notes.append(f"The tiles hold bands {first}, the checkpoint was trained on {description.bands}.")
    ground, known = shards.tile_px * shards.gsd_m, description.tile * description.gsd
    if abs(ground / known - 1) <= SAME_GROUND:
        if description.tile != shards.tile_px:
            notes.append(
                f"The tiles are resized from {shards.tile_px} to {description.tile} pixels, as the encoder knows them."
            )
        return description.tile, ground / description.tile, notes
    if abs(shards.gsd_m / description.gsd - 1) > SAME_GSD:
        notes.append(
            f"The tiles have {shards.gsd_m:g} m a pixel, and the encoder was pretrained at {description.gsd:g} m."
        )
    return shards.tile_px, shards.gsd_m, notes
