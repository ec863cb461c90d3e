"""The tiles of a pretraining: which train, which are held out, what they are like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.settings import PretrainSettings
from rsosm_cli.text.weights import read_key_counts
from rsosm_cli.tiles.dataset import Division, divide, effective_batch
from rsosm_cli.tiles.shards import TileShards, key_counts

# Statistics of ImageNet, which the published weights expect of RGB images (values 0..1).
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Tiles whose pixels are averaged where there are no such statistics.
_STATISTICS_TILES = 512


@dataclass(frozen=True)
class Corpus:
    """The tiles of a pretraining."""

    shards: TileShards
    division: Division
    counts: dict[str, int] | None = None  # of a table, in place of the tiles' own

    def key_counts(self) -> dict[str, int]:
        """Return how often each tag key occurs, for the weights of tags: as a table says, or on the training tiles."""
        return key_counts(self.shards, self.division.train) if self.counts is None else self.counts


def open_corpus(stores: tuple[Path, ...], settings: PretrainSettings) -> Corpus:
    """Open the stores and divide their tiles; raises an error of ours where none can be trained on."""
    shards = TileShards(stores)
    named = stores[0] if len(stores) == 1 else f"{len(stores)} stores"
    if len(shards.bands) != settings.model.in_chans:
        raise UsageError(
            f"The tiles of {named} have {len(shards.bands)} bands, and the model takes {settings.model.in_chans}.",
            hint=f"Set model.in_chans={len(shards.bands)}.",
        )
    division = divide(shards, settings.holdout, settings.seed)
    if not len(division.train):
        raise MissingError(
            f"None of the {len(shards)} tiles of {named} has an image, and pretraining needs images.",
            hint="Run `rsosm fetch` with --imagery and `rsosm build-graph` again.",
            tiles=len(shards),
        )
    table = settings.text.tag_counts
    return Corpus(shards, division, read_key_counts(Path(table)) if table else None)


def statistics(corpus: Corpus) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the bands, of values 0..1."""
    shards, train = corpus.shards, corpus.division.train
    if len(shards.bands) == 3:
        return _IMAGENET
    some = train[:: max(1, len(train) // _STATISTICS_TILES)]
    pixels = shards.images(some).astype(np.float32) / 255  # (n, C, H, W)
    return tuple(pixels.mean(axis=(0, 2, 3)).tolist()), tuple(pixels.std(axis=(0, 2, 3)).clip(1e-3).tolist())


def corpus_numbers(corpus: Corpus, settings: PretrainSettings, world: int) -> dict[str, Any]:
    """Return how large a training is."""
    division = corpus.division
    batch = effective_batch(settings.optim.batch_size, len(division.train), world)
    return {
        "stores": len(corpus.shards.paths),
        "training_tiles": len(division.train),
        "heldout_tiles": len(division.holdout),
        "tags": len(corpus.shards.tags),
        "epochs": settings.optim.epochs,
        "batch": batch,
        "steps": len(division.train) // batch * settings.optim.epochs,
    }


def corpus_notes(corpus: Corpus, settings: PretrainSettings) -> list[str]:
    """Return what was left out, and why."""
    division, shards = corpus.division, corpus.shards
    notes = []
    if division.without_image:
        notes.append(
            f"{division.without_image} of {len(shards)} tiles have an image over less than half and are left out."
        )
    if division.beside_holdout:
        notes.append(f"{division.beside_holdout} tiles share ground with held-out ones and are left out.")
    bare = int((shards.n_objects[division.train] == 0).sum())
    if bare and settings.method != "mmgr":  # which tells of points of interest
        notes.append(f"{bare} training tiles have no OSM object and take part in the reconstruction alone.")
    if corpus.counts is not None and (unknown := len(set(shards.tag_keys) - corpus.counts.keys())):
        notes.append(
            f"{unknown} of the tiles' {len(set(shards.tag_keys))} tag keys are not in {settings.text.tag_counts} and "
            "weigh nothing."
        )
    if settings.optim.batch_size > len(division.train):
        notes.append(f"The batch is all {len(division.train)} training tiles: fewer than {settings.optim.batch_size}.")
    if settings.model.image_size != shards.tile_px:
        notes.append(f"Tiles of {shards.tile_px} pixels are seen at {settings.model.image_size}.")
    return notes
