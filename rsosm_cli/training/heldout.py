"""Held-out tiles: their losses, and whether an image finds its own graph among the others.

A retrieval at chance says that the two encoders have learnt nothing in common, or have collapsed to one answer. Tiles
that overlap hold each other's objects, so an image chooses among tiles that share no ground: those of its own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import HeteroData

from rsosm_cli.models.contrastive import gather
from rsosm_cli.models.encodings import StepLosses, values_of
from rsosm_cli.tiles.apart import groups_apart
from rsosm_cli.tiles.dataset import TileBatch, load_views
from rsosm_cli.tiles.draws import hashed

if TYPE_CHECKING:
    from rsosm_cli.training.pretrain import Trainer

# Candidates of the retrieval: more would make epochs of small corpora long and the number hard to compare.
MAX_TILES = 1024
# Below this many candidates, hits by chance are too likely to tell chance from learning.
_ENOUGH = 20
# The retrieval is at chance while guessing has as many hits in more than one case of ten.
_DOUBT = 0.1
# The masks of held-out tiles are those of an epoch that training never reaches, so losses compare over epochs.
_EPOCH = -1
_ORDER_DRAWS = 0x72657472


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation found; all ranks hold the same metrics."""

    metrics: dict[str, float | int] = field(default_factory=dict)
    hits: int = 0
    images: int = 0
    groups: int = 1  # of images that choose among each other's graphs

    @property
    def at_chance(self) -> bool:
        """Whether the retrieval is no better than guessing, whose hits are Poisson around one a group."""
        from scipy.stats import poisson

        enough = self.images >= _ENOUGH * self.groups
        return enough and float(poisson.sf(self.hits - 1, self.groups)) > _DOUBT

    def verdict(self, epoch: int) -> str:
        return (
            f"After epoch {epoch}, {self.hits} of {self.images} held-out images find their own graph, as by "
            f"guessing: image and objects have nothing in common yet, or have collapsed. More epochs, a larger "
            f"batch or a higher weight of the contrast may help."
        )


@dataclass(frozen=True)
class Example:
    """A batch of held-out tiles with what the model made of it, for the report."""

    batch: TileBatch
    images: Tensor  # (B, C, H, W) normalised
    graphs: HeteroData
    losses: StepLosses


def evaluate(trainer: Trainer) -> HeldOut:
    """Return losses and retrieval on the held-out tiles; every rank must call it."""
    fabric, model, held = trainer.fabric, trainer.model, trainer.corpus.division.holdout
    # In an order without neighbours side by side: the contrast of a batch is then as hard as one of training.
    held = held[np.argsort(hashed(_ORDER_DRAWS, held), kind="stable")]
    held = held[: min(len(held), MAX_TILES) // fabric.world_size * fabric.world_size]
    tiles = _share(trainer, held)
    if not len(tiles):
        return HeldOut()
    model.eval()
    sums = torch.zeros(len(trainer.names), device=fabric.device)
    images, regions, has = [], [], []
    with torch.no_grad(), fabric.autocast():
        for batch in _batches(trainer, tiles):
            inputs = trainer.inputs(batch, _EPOCH, colour=False)
            sums += len(batch) * values_of(trainer.losses(inputs))
            pairs = model.pairs(inputs.images, inputs.graphs, inputs.gsd_m)
            if pairs is not None:
                images.append(pairs.images.float())
                regions.append(pairs.objects.float())
                has.append(pairs.valid.float())
    sums = torch.as_tensor(fabric.all_reduce(sums / len(tiles), reduce_op="mean"))
    metrics: dict[str, float | int] = {
        f"heldout_{name}": value for name, value in zip(trainer.names, sums.tolist(), strict=True)
    }
    if not images:
        return HeldOut(metrics)
    image, region, usable = (gather(torch.cat(x)) for x in (images, regions, has))
    keep = usable > 0
    n = int(keep.sum())
    if n < 2:
        return HeldOut(metrics)
    group = torch.from_numpy(groups_apart(trainer.corpus.shards.grounds, held)).to(keep.device)[keep]
    hits, groups = top1_hits(image[keep], region[keep], group), len(group.unique())
    metrics |= {"retrieval_top1": hits / n, "chance": groups / n, "candidates": round(n / groups, 1)}
    return HeldOut(metrics, hits, n, groups)


def top1_hits(images: Tensor, regions: Tensor, group: Tensor) -> int:
    """Return for how many of the pairs (N, P) the image's most similar region of its ``group`` (N,) is its own.

    Ties are misses.
    """
    similarity = functional.normalize(images, dim=1) @ functional.normalize(regions, dim=1).T  # (N, N)
    own = similarity.diagonal()
    no_rival = (group[:, None] != group) | torch.eye(len(own), dtype=torch.bool, device=own.device)
    return int((own > similarity.masked_fill(no_rival, -torch.inf).amax(1)).sum())


def example(trainer: Trainer, count: int) -> Example | None:
    """Return what the model makes of some tiles, held out where there are such; every rank must call it."""
    division, objects = trainer.corpus.division, trainer.corpus.shards.n_objects
    tiles = division.holdout if len(division.holdout) else division.train
    tiles = tiles[np.argsort(-objects[tiles], kind="stable")][: count * trainer.fabric.world_size]
    tiles = _share(trainer, tiles)
    if not len(tiles):
        return None
    model = trainer.model
    model.eval()
    batch = _load(trainer, tiles)
    with torch.no_grad():
        inputs = trainer.inputs(batch, _EPOCH, colour=False)
        return Example(batch, inputs.images, inputs.graphs, trainer.losses(inputs))


def _share(trainer: Trainer, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return this rank's share of ``tiles``, equal on all ranks."""
    fabric = trainer.fabric
    mine = min(len(tiles), MAX_TILES) // fabric.world_size
    return tiles[fabric.global_rank * mine : (fabric.global_rank + 1) * mine]


def _batches(trainer: Trainer, tiles: NDArray[np.int64]) -> Iterator[TileBatch]:
    size = trainer.batches.batch_size // trainer.fabric.world_size
    for start in range(0, len(tiles), size):
        yield _load(trainer, tiles[start : start + size])


def _load(trainer: Trainer, tiles: NDArray[np.int64]) -> TileBatch:
    return load_views(trainer.corpus.shards, tiles, trainer.settings.model.image_size, trainer.batches.second)
