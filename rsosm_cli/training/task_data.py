"""Labelled tiles for a task: batches of image, graph and label that are turned and mirrored alike.

A batch is a function of (seed, epoch, step), as in pretraining, so that a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch_geometric.data import HeteroData

from rsosm_cli.graph.arrays import GraphArrays, NodeArrays
from rsosm_cli.models.checkpoint import Description
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.augment import normalise, ordered, view_images, whole_views
from rsosm_cli.tiles.draws import Shuffle, uniform
from rsosm_cli.tiles.ragged import owners
from rsosm_cli.tiles.shards import TileShards
from rsosm_cli.tiles.tags import Selection, TagInputs

_DRAWS = 0x7461736B  # separates these draws from those of pretraining
# Brightness, contrast and saturation are changed by at most this share: half of pretraining's, as the head learns
# from few tiles and colour tells classes apart.
COLOUR = 0.2


@dataclass(frozen=True)
class TaskTiles:
    """Labelled tiles of all stores. ``L`` tiles.

    ``truth``: class codes (L, H, W) uint8; one class a tile (L,) uint8; values (L,) or shares (L, K) float64.
    """

    shards: TileShards
    tiles: NDArray[np.int64]  # (L,) numbers in the shards
    truth: NDArray[np.uint8] | NDArray[np.float64]
    size: int  # pixels that images are resized to: what the encoder was pretrained on

    def __len__(self) -> int:
        return len(self.tiles)


@dataclass(frozen=True)
class TaskBatch:
    """``B`` labelled tiles as they leave a worker."""

    rows: Tensor  # (B,) int64 into the labelled tiles
    images: Tensor  # (B, C, size, size) uint8
    colour: Tensor  # (B, 3) float32 factors
    graphs: GraphArrays
    truth: Tensor  # (B, H, W) or (B,) uint8, (B,) or (B, K) float32


@dataclass(frozen=True)
class Inputs:
    """What turns a batch into a model's inputs: the checkpoint's normalisation and tag vectors, on a device."""

    mean: Tensor  # (C,)
    std: Tensor  # (C,)
    tags: TagInputs

    @classmethod
    def of(cls, description: Description, tags: list[str], *, offline: bool) -> Inputs:
        """Return the inputs' tables for the tags of the stores, by the text model and the weights of the checkpoint."""
        from rsosm_cli.text.categories import load_tag_encoder
        from rsosm_cli.text.weights import tag_weights

        # The images of two dates lie one after the other along the bands.
        images = 1 if description.task is None else description.task.images
        mean, std = (torch.tensor(values).repeat(images) for values in (description.mean, description.std))
        selection = Selection.of(description.model)
        if description.text.encoder == "vectors":  # ready graphs carry the vectors of their nodes
            return cls(mean, std, TagInputs(torch.zeros(0, description.text.width), torch.zeros(0), selection))
        encoder = load_tag_encoder(description.text.encoder, description.categories, offline=offline)
        weights = tag_weights(tags, description.key_counts, description.tag_weight)
        return cls(mean, std, TagInputs(encoder.encode(tags), weights, selection, selection.ranks(tags)))

    def to(self, device: torch.device) -> Inputs:
        return Inputs(self.mean.to(device), self.std.to(device), self.tags.to(device))

    def prepare(self, batch: TaskBatch, modality: str) -> tuple[Tensor, HeteroData | None]:
        """Return normalised images (B, C, H, W) and the heterographs, on the device of the tables.

        Image-only models get no graphs. An OSM-only model looks at nothing of the image but its size.
        """
        device = self.mean.device
        graphs = None
        if modality != "image":
            graphs = self.tags.batch(batch.graphs)
        if modality == "osm":
            return torch.zeros(1, device=device).expand(batch.images.shape), graphs
        return normalise(batch.images.to(device), self.mean, self.std, batch.colour.to(device)), graphs


class TaskBatches(Dataset[TaskBatch]):
    """Batches of the rows given; an item is asked for by (epoch, step).

    In training, each epoch has another order, the last batch is filled up from the start of the order, and tiles are
    turned by quarters and mirrored (aerial images have no up) with a little jitter of colour. ``rank`` of ``world``
    processes gets every ``world``-th tile of a batch.
    """

    def __init__(
        self,
        tiles: TaskTiles,
        rows: NDArray[np.int64],
        batch_size: int,
        *,
        seed: int = 0,
        train: bool = False,
        augment: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.tiles, self.rows, self.seed, self.train, self.augment = tiles, rows, seed, train, augment
        self.rank, self.world = rank, world
        fitting = max(world, min(batch_size, len(rows)))
        self.batch_size = fitting // world * world if train else fitting

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, place: tuple[int, int]) -> TaskBatch:
        epoch, step = place
        return load_rows(self.tiles, self.rows_at(epoch, step), (self.seed, epoch) if self.augment else None)

    def rows_at(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the labelled tiles of this rank's share of a batch."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if not self.train:
            return self.rows[places[places < len(self.rows)]]
        places = places[self.rank :: self.world]
        return self.rows[Shuffle(len(self.rows), self.seed, epoch).at(places % len(self.rows))]

    def loader(self, *, workers: int, epochs: range) -> DataLoader[TaskBatch]:
        """Return a loader of the batches of some epochs, one after the other."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=_Places(len(self), epochs),
            num_workers=workers,
            worker_init_fn=_one_thread if workers else None,
        )


class _Places(Sampler[tuple[int, int]]):
    def __init__(self, steps: int, epochs: range) -> None:
        self.steps, self.epochs = steps, epochs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for epoch in self.epochs:
            for step in range(self.steps):
                yield epoch, step

    def __len__(self) -> int:
        return self.steps * len(self.epochs)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def load_rows(tiles: TaskTiles, rows: NDArray[np.int64], draw: tuple[int, int] | None = None) -> TaskBatch:
    """Return the tiles of ``rows``, turned and mirrored as ``draw`` = (seed, epoch) has it."""
    numbers = tiles.tiles[rows]
    views = whole_views(len(rows), tiles.shards.tile_px)
    images = view_images(read_images(tiles.shards, numbers), views, tiles.size)
    graphs = tiles.shards.graphs(numbers)
    values = tiles.truth[rows]
    truth = torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.float32))
    colour = np.ones((len(rows), 3), np.float32)
    if draw is not None:
        u = uniform(_DRAWS, *draw, rows[:, None], np.arange(6))  # (B, 6)
        turns = u[:, :3] < 0.5  # (B, 3) transpose, mirror left to right, mirror top to bottom
        colour = (1 + COLOUR * (2 * u[:, 3:] - 1)).astype(np.float32)
        images = turn_images(images, turns)
        graphs = turn_graphs(graphs, turns)
        if truth.ndim == 3:
            truth = turn_images(truth, turns)
    return TaskBatch(torch.from_numpy(rows), images, torch.from_numpy(colour), graphs, truth)


def read_images(shards: TileShards, tiles: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return (B, C, H, W) images, zeros where a store has none: OSM-only models are trained without."""
    seen = shards.image_share[tiles] > 0
    if seen.all():
        return shards.images(tiles)
    images = np.zeros((len(tiles), len(shards.bands), shards.tile_px, shards.tile_px), np.uint8)
    if seen.any():
        images[seen] = shards.images(tiles[seen])
    return images


def turn_images(images: Tensor, turns: NDArray[np.bool_]) -> Tensor:
    """Return (B, ..., H, W) with the images transposed and mirrored along x and y, as ``turns`` (B, 3) says."""
    out = images.clone()
    for column, change in enumerate((lambda x: x.transpose(-1, -2), lambda x: x.flip(-1), lambda x: x.flip(-2))):
        chosen = torch.from_numpy(turns[:, column])
        out[chosen] = change(out[chosen])
    return out


def turn_graphs(graphs: GraphArrays, turns: NDArray[np.bool_]) -> GraphArrays:
    """Return the graphs with all positions moved as :func:`turn_images` moves the pixels."""
    return replace(graphs, nodes={name: _turn_nodes(n, turns) for name, n in graphs.nodes.items()})


def _turn_nodes(n: NodeArrays, turns: NDArray[np.bool_]) -> NodeArrays:
    transpose, along_x, along_y = turns[owners(n.offsets)].T  # (N,) each

    def moved(points: NDArray[np.float32]) -> NDArray[np.float32]:  # (N, k, 2)
        points = points.copy()
        points[transpose] = points[transpose][:, :, ::-1]
        points[along_x, :, 0] = 1 - points[along_x, :, 0]
        points[along_y, :, 1] = 1 - points[along_y, :, 1]
        return points

    envelope = moved(n.envelope)
    odd = transpose ^ along_x ^ along_y
    envelope[odd] = envelope[odd, ::-1]  # a mirrored ring runs the other way round
    centroid = moved(n.centroid[:, None])[:, 0]
    return replace(n, key_points=moved(n.key_points), envelope=ordered(envelope), centroid=centroid)


def target_moments(task: TaskSettings, values: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean and standard deviation of the training targets (of ln(1 + value) with ``log_target``)."""
    fitted = np.log1p(np.maximum(values, 0)) if task.log_target else values
    return float(fitted.mean()), float(max(fitted.std(), 1e-6))
