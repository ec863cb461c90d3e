"""Features of a frozen encoder, computed once: what a head is then trained on in minutes, even on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsosm_cli.models.heads import TaskModel
from rsosm_cli.training.task_data import Inputs, TaskTiles, load_rows

if TYPE_CHECKING:
    from lightning.fabric import Fabric

# Memory that the features of all labelled tiles may take; beyond it they are computed anew for every batch.
CACHE_BYTES = 4e9


@dataclass(frozen=True)
class Features:
    """What the head reads, a row a tile, on the host."""

    place: NDArray[np.int64]  # row of the labelled tiles -> row here, -1 for none
    maps: list[Tensor]  # (N, ...) float32 each

    def of(self, rows: NDArray[np.int64], device: torch.device) -> list[Tensor]:
        places = torch.from_numpy(self.place[rows])
        return [m[places].to(device) for m in self.maps]


@torch.no_grad()
def cache_features(
    model: TaskModel,
    inputs: Inputs,
    tiles: TaskTiles,
    rows: NDArray[np.int64],
    fabric: Fabric,
    batch_size: int,
    gsd_m: float,
) -> Features | None:
    """Return the features of ``rows`` as a frozen ``model`` makes them, or None where they do not fit or are trained.

    Tiles are seen as they are, not turned: the features stand for one view. An OSM-only segmentation asks the objects
    with a query that is trained, so its features change.
    """
    if model.query is not None:
        return None
    model.eval()
    place = np.full(len(tiles), -1, np.int64)
    place[rows] = np.arange(len(rows))
    maps: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = load_rows(tiles, rows[start : start + batch_size])
        images, graphs = inputs.prepare(batch, model.task.modality)
        with fabric.autocast():
            found = [f.float().cpu() for f in model.features(images, graphs, gsd_m=gsd_m)]
        if not maps:
            if sum(f[0].numel() for f in found) * 4 * len(rows) > CACHE_BYTES:
                return None
            maps = [torch.empty((len(rows), *f.shape[1:])) for f in found]
        for kept, new in zip(maps, found, strict=True):
            kept[start : start + len(new)] = new
    return Features(place, maps)
