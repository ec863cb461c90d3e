"""Batches of augmented tiles for pretraining, and which tiles are held out.

A batch is a function of (seed, epoch, step, rank): the loader has no state, so that a run can be resumed at any step
and gives the same batches with any number of workers. All work on a batch is vectorised; a worker hands over flat
arrays, and what the device does better (normalising, colour, tag vectors) is left to the device.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.settings import AugmentSettings
from rsosm_cli.tiles.augment import Views, draw_views, view_graphs, view_images, whole_views
from rsosm_cli.tiles.draws import Shuffle, hashed
from rsosm_cli.tiles.shards import Ground, TileShards

# A tile with less image than this is left out: mostly empty pixels teach the reconstruction nothing.
MIN_IMAGE_SHARE = 0.5
# Side of a block of held-out ground, in tiles: large enough that most held-out tiles have held-out neighbours.
_BLOCK_TILES = 4
_HOLDOUT_DRAWS = 0x686F6C64
_AHEAD = 4  # batches that a worker prepares ahead


@dataclass(frozen=True)
class TileBatch:
    """``B`` tiles as they leave a worker."""

    samples: Tensor  # (B,) int64 numbers in the data set, on which all draws depend
    images: Tensor  # (B, C, size, size) uint8
    colour: Tensor  # (B, 3) float32 factors
    gsd_m: Tensor  # (B,) float32 metres on the ground a pixel, after the resizing
    graphs: GraphArrays
    second: Tensor | None = None  # (B, C, size, size) uint8, another view of each tile
    second_colour: Tensor | None = None  # (B, 3)

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> TileBatch:
        names = ("samples", "images", "colour", "gsd_m", "second", "second_colour")
        pinned = {k: getattr(self, k).pin_memory() for k in names if getattr(self, k) is not None}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Second:
    """A second augmented view of every tile, for methods that contrast two."""

    augment: AugmentSettings
    seed: int


def load_views(shards: TileShards, tiles: NDArray[np.int64], size: int, second: Second | None = None) -> TileBatch:
    """Return ``tiles`` as they are, resized to ``size`` pixels; a ``second`` view is the same each time."""
    return _load(shards, tiles, whole_views(len(tiles), shards.tile_px), size, second, epoch=-1)


def _load(
    shards: TileShards, tiles: NDArray[np.int64], views: Views, size: int, second: Second | None, *, epoch: int
) -> TileBatch:
    images = shards.images(tiles)
    other = None
    if second is not None:
        other = draw_views(second.augment, shards.tile_px, second.seed, epoch, tiles, number=1)
    return TileBatch(
        samples=torch.from_numpy(tiles),
        images=view_images(images, views, size),
        second=None if other is None else view_images(images, other, size),
        second_colour=None if other is None else torch.from_numpy(other.colour),
        colour=torch.from_numpy(views.colour),
        gsd_m=torch.from_numpy((views.side * shards.gsd_m / size).astype(np.float32)),
        graphs=view_graphs(shards.graphs(tiles), views),
    )


@dataclass(frozen=True)
class Part:
    """A rank's share of every batch."""

    rank: int = 0
    world: int = 1


class PretrainBatches(Dataset[TileBatch]):
    """The batches of every epoch; an item is asked for by (epoch, step).

    ``tiles``: numbers of the training tiles. ``batch_size``: over all ranks. The last, incomplete batch of an epoch is
    left out; the order changes every epoch, so each tile is seen. ``views``: 2 for a second view of each image.
    """

    def __init__(
        self,
        shards: TileShards,
        tiles: NDArray[np.int64],
        *,
        batch_size: int,
        size: int,
        augment: AugmentSettings,
        seed: int,
        part: Part | None = None,
        views: int = 1,
    ) -> None:
        self.second = Second(augment, seed) if views == 2 else None
        self.shards = shards
        self.tiles = tiles
        self.part = part or Part()
        self.batch_size = effective_batch(batch_size, len(tiles), self.part.world)
        self.size = size
        self.augment = augment
        self.seed = seed

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return len(self.tiles) // self.batch_size

    def __len__(self) -> int:
        return self.steps

    def samples(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the tiles of this rank's share of a batch."""
        mine = self.batch_size // self.part.world
        first = step * self.batch_size + self.part.rank * mine
        places = Shuffle(len(self.tiles), self.seed, epoch).at(np.arange(first, first + mine))
        return self.tiles[places].astype(np.int64)

    def __getitem__(self, place: tuple[int, int]) -> TileBatch:
        epoch, step = place
        tiles = self.samples(epoch, step)
        views = draw_views(self.augment, self.shards.tile_px, self.seed, epoch, tiles)
        return _load(self.shards, tiles, views, self.size, self.second, epoch=epoch)


def effective_batch(batch_size: int, tiles: int, world: int) -> int:
    """Return the batch over all ranks: ``batch_size``, or what there is where that is less, a multiple of ``world``."""
    return max(world, min(batch_size, tiles) // world * world)


class _Places(Sampler[tuple[int, int]]):
    """(epoch, step) from a place on, to the end of training."""

    def __init__(self, steps: int, epochs: int, start: int) -> None:
        self.steps, self.total, self.start = steps, steps * epochs, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.total):
            yield divmod(step, self.steps)

    def __len__(self) -> int:
        return max(0, self.total - self.start)


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of a terminal: the training finishes its step, and needs its workers for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(
    batches: PretrainBatches,
    *,
    epochs: int,
    start: int,
    workers: int,
    pin: bool = False,
    start_method: str | None = None,
) -> DataLoader[TileBatch]:
    """Return a loader of the batches from step ``start`` (counted over all epochs) to the end of ``epochs``.

    It runs through the ends of epochs, so workers never start anew and never idle there.
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=_Places(batches.steps, epochs, start),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=_AHEAD if workers else None,
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=_start_worker,
    )


@dataclass(frozen=True)
class Division:
    """Which tiles train and which are held out; both have an image."""

    train: NDArray[np.int64]
    holdout: NDArray[np.int64]
    without_image: int
    beside_holdout: int  # tiles left out because they share ground with held-out ones


def divide(shards: TileShards, share: float, seed: int) -> Division:
    """Hold out about ``share`` of the tiles as whole blocks of ground; tiles that overlap one are in neither part.

    Blocks are squares of four tiles on the lattice of the CRS, in the order of a hash of their place: the same
    ground is held out of every store that covers it.
    """
    usable = shards.image_share >= MIN_IMAGE_SHARE
    block = _blocks(shards.grounds)  # (T,)
    keys, inverse, sizes = np.unique(block[usable], return_inverse=True, return_counts=True)
    order = np.argsort(hashed(_HOLDOUT_DRAWS, seed, keys.view(np.int64)), kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    wanted = share * usable.sum()
    # A block is taken while less than the wanted share is held out; one block at least stays for training.
    taken = order[(before < wanted - 0.5) & (np.arange(len(order)) < len(order) - 1)]
    held = np.zeros(len(shards), dtype=bool)
    held[np.flatnonzero(usable)[np.isin(inverse, taken)]] = True
    beside = usable & ~held & _overlapping(shards.grounds, held)
    return Division(
        train=np.flatnonzero(usable & ~held & ~beside),
        holdout=np.flatnonzero(held),
        without_image=int((~usable).sum()),
        beside_holdout=int(beside.sum()),
    )


def _blocks(grounds: Sequence[Ground]) -> NDArray[np.uint64]:
    """Return a key of the block of ground that each tile's centre lies in."""
    keys = []
    for number, ground in enumerate(grounds):
        west, south, east, north = ground.bounds_m.T
        placed: NDArray[np.bool_] = np.all(np.isfinite(ground.bounds_m), axis=1)
        # Rounded so that equal grids of two stores give equal blocks in spite of the last bit.
        side = round(_BLOCK_TILES * float(np.median((east - west)[placed])), 3) if placed.any() else 1.0
        column = np.floor(np.where(placed, west + east, 0) / 2 / side).astype(np.int64)
        row = np.floor(np.where(placed, south + north, 0) / 2 / side).astype(np.int64)
        # A chip without a place is its own block.
        alone = hashed(number, np.arange(len(placed)))
        keys.append(np.where(placed, hashed(_name_key(ground.crs), column, row), alone))
    return np.concatenate(keys)


def _name_key(name: str) -> int:
    return int.from_bytes(name.encode()[-8:].rjust(8, b"\0"), "big", signed=True)


def _overlapping(grounds: Sequence[Ground], held: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which tiles share ground with a held-out tile of the same CRS.

    Tiles of one size meet where their south-west corners are less than a side apart along both axes.
    """
    out = np.zeros(len(held), dtype=bool)
    starts = np.concatenate([[0], np.cumsum([len(g.bounds_m) for g in grounds])])
    for crs in {g.crs for g in grounds}:
        members = [i for i, g in enumerate(grounds) if g.crs == crs]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        bounds = np.concatenate([grounds[i].bounds_m for i in members])
        placed: NDArray[np.bool_] = np.all(np.isfinite(bounds), axis=1)
        rows, bounds = rows[placed], bounds[placed]
        if not held[rows].any():
            continue
        from scipy.spatial import cKDTree

        corners = bounds[:, :2]
        side = float((bounds[:, 2] - bounds[:, 0]).max())
        nearest, _ = cKDTree(corners[held[rows]]).query(corners, p=math.inf)
        # A millionth of slack: neighbours on a grid touch, and touching is not sharing.
        out[rows] = nearest < side * (1 - 1e-6)
    return out
