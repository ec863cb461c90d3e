"""kNN: what an encoding is worth without any training (GeoLink, section 4; k = 20).

A tile has the value, class or shares of its nearest training tiles. Segmentation: the class of a patch is that of the
nearest training patches, by vote; an OSM-only encoding is one vector a tile, which then votes for the whole tile.
Votes and values are weighted by the cosine of the encodings, as exp(cosine / 0.07) (Wu et al. 2018).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsosm_cli.models.checkpoint import load_checkpoint
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.progress import Advance, Progress
from rsosm_cli.settings import TaskSettings
from rsosm_cli.tiles.shards import TileShards
from rsosm_cli.training.finetune import EVAL_BATCH, Job, Outcome
from rsosm_cli.training.kinds import kind_of
from rsosm_cli.training.metrics import confusion, segmentation_metrics
from rsosm_cli.training.task_data import Inputs, TaskTiles, load_rows

if TYPE_CHECKING:
    from lightning.fabric import Fabric

TEMPERATURE = 0.07
# Training vectors kept at most; more are thinned by the seed. 200,000 patches of ViT-L are 0.8 GB.
MEMORY = 200_000
# Queries at a time against the whole memory.
QUERIES = 4096


@torch.no_grad()
def knn(fabric: Fabric, progress: Progress, job: Job) -> Outcome:
    """Classify or estimate the test tiles by their nearest training tiles. One process does it."""
    started = time.monotonic()
    task = job.task
    assert job.encoder is not None
    encoder = load_checkpoint(job.encoder).encoder.to(fabric.device).eval()
    tiles = TaskTiles(TileShards(job.stores), job.tiles, job.truth, job.description.tile)
    inputs = Inputs.of(job.description, tiles.shards.tags, offline=job.offline).to(fabric.device)
    test = job.rows("test")
    with progress.task(f"{task.name} (knn, {task.modality})", len(job.train_rows) + len(test), "tiles") as advance:
        memory, votes = _remember(encoder, inputs, tiles, job, fabric, advance)
        predicted = []
        for start in range(0, len(test), EVAL_BATCH):
            rows = test[start : start + EVAL_BATCH]
            vectors = _vectors(encoder, inputs, tiles, rows, job, fabric)  # (B, D, h, w)
            b, d, h, w = vectors.shape
            flat = vectors.permute(0, 2, 3, 1).reshape(-1, d)
            found = torch.cat(
                [_ask(flat[i : i + QUERIES], memory, votes, task.neighbours) for i in range(0, len(flat), QUERIES)]
            )
            predicted.append(found.reshape(b, h, w, -1).permute(0, 3, 1, 2).cpu())
            advance(len(rows))
    outcome = Outcome(job.seed, [], 0, float("nan"), [], test, seconds=time.monotonic() - started)
    block = job.block[test]
    out = torch.cat(predicted)  # (T, K or 1, h, w)
    if not task.dense:
        answers = out[:, :, 0, 0].double().numpy()
        if task.categorical:
            outcome.matrices = confusion(
                np.asarray(job.truth[test], np.uint8), answers.argmax(axis=1), len(task.classes)
            )
            rows = outcome.matrices.reshape(len(test), -1).astype(np.float64)
        else:
            outcome.predicted = rows = answers
        outcome.test = kind_of(task).metrics(np.asarray(rows, np.float64), job.truth[test], block)
        return outcome
    size = job.truth.shape[1:]
    k = len(task.classes)
    matrices = []
    for start in range(0, len(test), EVAL_BATCH):
        share = functional.interpolate(out[start : start + EVAL_BATCH], size=size, mode="bilinear", align_corners=False)
        codes = share.argmax(dim=1).numpy()
        truth = job.truth[test[start : start + EVAL_BATCH]].astype(np.int64)
        matrices.append(confusion(truth, codes, k))
    outcome.matrices = np.concatenate(matrices)
    outcome.test = segmentation_metrics(outcome.matrices, block, [c.name for c in task.classes])
    return outcome


def _vectors(
    encoder: TileEncoder, inputs: Inputs, tiles: TaskTiles, rows: NDArray[np.int64], job: Job, fabric: Fabric
) -> Tensor:
    """Return normalised encodings (B, D, h, w); one place a tile where the task has one value or no map."""
    task = job.task
    images, graphs = inputs.prepare(load_rows(tiles, rows), task.modality)
    maps = task.dense and task.modality != "osm"
    with fabric.autocast():
        found = encoder.encode(None if task.modality == "osm" else images, graphs, maps=maps, gsd_m=job.description.gsd)
    chosen = getattr(found, f"{task.modality}_map" if maps else task.modality)
    vectors = chosen if maps else chosen[:, :, None, None]
    return functional.normalize(vectors.float(), dim=1)


def _remember(
    encoder: TileEncoder, inputs: Inputs, tiles: TaskTiles, job: Job, fabric: Fabric, advance: Advance
) -> tuple[Tensor, Tensor]:
    """Return the training vectors (M, D) and what each says: class shares (M, K) or a value (M, 1)."""
    task = job.task
    vectors, says = [], []
    for start in range(0, len(job.train_rows), EVAL_BATCH):
        rows = job.train_rows[start : start + EVAL_BATCH]
        found = _vectors(encoder, inputs, tiles, rows, job, fabric)
        vectors.append(found.permute(0, 2, 3, 1).reshape(-1, found.shape[1]))
        says.append(_truth_of(task, job.truth[rows], found.shape[2:]).to(fabric.device))
        advance(len(rows))
    memory, told = torch.cat(vectors), torch.cat(says)
    known = told.sum(dim=1) > 0 if task.kind != "regression" else torch.ones(len(told), dtype=torch.bool)
    memory, told = memory[known], told[known]
    if len(memory) > MEMORY:
        chosen = np.random.default_rng(job.seed).choice(len(memory), MEMORY, replace=False)
        memory, told = memory[torch.from_numpy(chosen)], told[torch.from_numpy(chosen)]
    return memory, told


def _truth_of(task: TaskSettings, truth: NDArray, grid: torch.Size) -> Tensor:
    """Return the class shares of the cells of a grid (B * h * w, K), rows of zeros without label; or values (B, 1)."""
    if task.kind == "regression":
        return torch.from_numpy(np.asarray(truth, np.float32))[:, None]
    if task.kind == "distribution":
        return torch.from_numpy(np.asarray(truth, np.float32))
    if task.kind == "classification":
        return functional.one_hot(torch.from_numpy(truth).long(), len(task.classes)).float()
    codes = torch.from_numpy(truth).long()
    k = len(task.classes)
    shares = functional.one_hot(codes.clamp(max=k), k + 1)[..., :k].permute(0, 3, 1, 2).float()
    cells = functional.adaptive_avg_pool2d(shares, (grid[0], grid[1]))  # (B, K, h, w)
    cells = cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return cells.permute(0, 2, 3, 1).reshape(-1, k)


def _ask(queries: Tensor, memory: Tensor, says: Tensor, neighbours: int) -> Tensor:
    """Return what the nearest of ``memory`` (M, D) say to ``queries`` (Q, D): (Q, K)."""
    near, which = (queries @ memory.T).topk(min(neighbours, len(memory)), dim=1)
    weight = ((near - 1) / TEMPERATURE).exp()
    return (weight[..., None] * says[which]).sum(dim=1) / weight.sum(dim=1, keepdim=True)
