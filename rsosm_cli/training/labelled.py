"""From label files and tile stores to a training: which tiles have labels, and which part of the ground each is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.folders import LabelFolder, folder_labels, match_items, read_folder
from rsosm_cli.tiles.labels import IGNORE, Extent, TileLabels, label_tiles, read_labels
from rsosm_cli.tiles.shards import TileShards
from rsosm_cli.training.splits import PARTS, Ground, Split, split_ground
from rsosm_cli.training.splits_images import split_images

log = logging.getLogger("rsosm")

# Groups of values that a split of a regression makes alike in its parts.
VALUE_GROUPS = 5


@dataclass(frozen=True)
class Labelled:
    """The labelled tiles of all stores. ``L`` tiles."""

    shards: TileShards
    cities: tuple[str, ...]  # a store
    tiles: NDArray[np.int64]  # (L,) numbers over all stores
    truth: NDArray[np.uint8] | NDArray[np.float64]  # see :class:`rsosm_cli.training.task_data.TaskTiles`
    split: Split
    notes: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        return {f"tiles_{part}": len(self.split.of(part)) for part in PARTS}


def label_stores(
    stores: Sequence[tuple[str, Path]],
    labels: Sequence[Path],
    task: TaskSettings,
    *,
    extent: Extent | None = None,
) -> Labelled:
    """Return the labelled tiles of (city, store) pairs and their split.

    A store that no label meets is left out, and said; raises :class:`MissingError` where that is every one. Tiles
    without image are left out where the task needs one.
    """
    shards = TileShards([path for _, path in stores])
    folders = [read_folder(path) for path in labels if path.is_dir()]
    labels = [path for path in labels if not path.is_dir()]
    if folders and labels:
        raise UsageError("Folders of labels and label files cannot be mixed.", hint="Give one or the other.")
    cities = tuple(city for city, _ in stores)
    notes: list[str] = []
    found: list[TileLabels] = []
    place: list[NDArray[np.int64]] = []
    owner: list[NDArray[np.int64]] = []
    missing: MissingError | None = None
    start = 0
    for index, ground in enumerate(shards.grounds):
        try:
            if folders:
                here = _of_folders(folders, task, ground.names, shards.tile_px)
            else:
                read = read_labels(labels, task, ground.crs, extent=extent)
                notes += [n for n in read.notes if n not in notes]
                here = label_tiles(read, ground.bounds_m, shards.tile_px)
        except MissingError as error:
            missing = missing or error
            notes.append(f"No label lies in {cities[index]}.")
        else:
            found.append(here)
            place.append(here.tiles + start)
            owner.append(np.full(len(here), index))
        start += len(ground.bounds_m)
    if not found:
        assert missing is not None
        raise missing
    tiles, city = np.concatenate(place), np.concatenate(owner)
    truth = np.concatenate([f.truth for f in found])
    if task.modality != "osm":
        seen = shards.image_share[tiles] > 0
        if not seen.any():
            raise MissingError(
                f"None of the {len(tiles)} labelled tiles has an image, and modality {task.modality} needs one.",
                hint="Fetch with --imagery and build the graphs again, or use --modality osm.",
            )
        if not seen.all():
            notes.append(f"{int((~seen).sum())} labelled tiles have no image and are not used.")
        tiles, city, truth = tiles[seen], city[seen], truth[seen]
    if all(not g.crs for g in shards.grounds):
        names = [name for g in shards.grounds for name in g.names]
        called = [names[i] for i in tiles.tolist()]
        known = np.full(len(called), -1, np.int8)
        for folder in folders:
            said = np.array([-1 if item is None else item.part for item in match_items(folder, called)], np.int8)
            known = np.where(known < 0, said, known)
        split = split_images(called, known, _content(task, truth), task.split, task.seed)
        return Labelled(shards, cities, tiles, truth, split, (*notes, *split.notes))
    bounds = np.concatenate([g.bounds_m for g in shards.grounds])[tiles]
    labelled = Ground(
        city, cities, tuple(g.crs for g in shards.grounds), tuple(_stride(g.bounds_m) for g in shards.grounds),
        bounds, _content(task, truth),
    )  # fmt: skip
    split = split_ground(labelled, task.split, task.seed)
    return Labelled(shards, cities, tiles, truth, split, (*notes, *split.notes))


def _of_folders(folders: Sequence[LabelFolder], task: TaskSettings, names: Sequence[str], tile_px: int) -> TileLabels:
    """Return the labels of a store's tiles from the first folder that has any of them."""
    missing: MissingError | None = None
    for folder in folders:
        try:
            return folder_labels(folder, task, names, tile_px)
        except MissingError as error:
            missing = missing or error
    assert missing is not None
    raise missing


def _stride(bounds_m: NDArray[np.float64]) -> float:
    """Return the step of a store's grid, in metres: the least distance between western edges."""
    edges = np.unique(np.round(bounds_m[:, 0], 3))
    if len(edges) < 2:
        edges = np.unique(np.round(bounds_m[:, 1], 3))
    side = float(bounds_m[0, 2] - bounds_m[0, 0])
    return min(side, float(np.diff(edges).min())) if len(edges) > 1 else side


def _content(task: TaskSettings, truth: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what each tile holds (L, K): pixels a class, shares, or which fifth of the values it belongs to."""
    if task.kind == "distribution":
        return np.asarray(truth, np.float64)
    if task.categorical:
        k = len(task.classes)
        flat = truth.reshape(len(truth), -1)
        return np.stack([(flat == c).sum(axis=1) for c in range(k) if c != IGNORE], axis=1).astype(np.float64)
    edges = np.quantile(truth, np.linspace(0, 1, VALUE_GROUPS + 1)[1:-1])
    return np.eye(VALUE_GROUPS)[np.searchsorted(edges, truth, side="right")]
