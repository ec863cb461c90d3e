"""From a batch of windows to logits on the cells of the head: normalisation, precision, test-time augmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from rsosm_cli.errors import UsageError
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.inference.mapping import WindowBatch
from rsosm_cli.models.checkpoint import Description
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.tiles.augment import normalise


class Predictor:
    """A task model as the mapping loop calls it.

    ``cell_px``: pixels a cell of what it returns; where a window has one answer, the cells of the map: a value is
    shared out evenly over them, a class is that of each. ``tta`` averages over the eight turns and mirrorings of a
    window, its graph alike: aerial images have no up.
    """

    def __init__(
        self, model: TaskModel, description: Description, device: torch.device, *,
        precision: Literal["32", "bf16"] = "32", tta: bool = False, cell_px: int | None = None,
    ) -> None:  # fmt: skip
        self.model = model.to(device).eval()
        self.task = model.task
        self.description = description
        self.device = device
        self.precision = precision
        self.tta = tta
        self.mean = torch.tensor(description.mean, device=device).repeat(self.task.images)
        self.std = torch.tensor(description.std, device=device).repeat(self.task.images)
        self.channels = 1 if self.task.kind == "regression" else len(self.task.classes)
        self.cell_px = cell_px or self._stride()

    @property
    def needs_image(self) -> bool:
        return self.task.modality != "osm"

    @property
    def needs_osm(self) -> bool:
        return self.task.modality != "image"

    def _stride(self) -> int:
        """Return the head's stride where it is whole pixels; else 1, and windows are upsampled before blending."""
        tile, stride, whole = self.description.tile, self.model.stride, self.model.encoder.stride
        if self.model.encoder.pyramid:
            return stride if tile % stride == 0 else 1
        if tile % whole:
            raise UsageError(
                f"The checkpoint's tiles of {tile} px are no multiple of its patches of {whole} px.",
                hint="Fine-tune on tiles of a multiple.",
            )
        upernet = self.task.dense and self.task.decoder == "upernet"
        return 1 if upernet and whole % 4 else stride

    @torch.inference_mode()
    def __call__(self, batch: WindowBatch) -> Tensor:
        """Return (B, K, n, n) float32 logits, calibrated; of a regression, (B, 1, n, n) values of the cells."""
        images, graphs = self.inputs(batch)
        cast = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
        with cast:
            if not self.tta:
                return self._cells(images, graphs)
            total: Tensor | None = None
            for turned, turned_graphs, back in _turns(images, graphs):
                found = back(self._cells(turned, turned_graphs))
                total = found if total is None else total + found
            assert total is not None
            return total / 8

    def inputs(self, batch: WindowBatch) -> tuple[Tensor, HeteroData | None]:
        """Return the normalised images (only their size, where the model sees none) and graphs, on the device."""
        graphs = batch.graphs if self.needs_osm else None
        if graphs is not None and not isinstance(graphs, HeteroData):
            raise TypeError(f"graphs of a batch are a {type(graphs).__name__}, not HeteroData")
        if not self.needs_image or batch.images is None:
            side = self.description.tile
            size = (len(batch.starts), self.task.images * len(self.description.bands), side, side)
            return torch.zeros(1, device=self.device).expand(size), graphs
        return normalise(batch.images.to(self.device), self.mean, self.std), graphs

    def _cells(self, images: Tensor, graphs: HeteroData | None) -> Tensor:
        gsd = self.description.gsd
        if self.task.kind == "regression":
            n = self.description.tile // self.cell_px
            values = self.model(images, graphs, gsd_m=gsd).float()
            if self.task.aggregate == "sum":  # the total of a window, shared out over its cells; a rate is that of each
                values = values / n**2
            return values[:, None, None, None].expand(-1, 1, n, n)
        # At a cell of one pixel windows are upsampled before they are blended.
        call = self.model if self.cell_px == 1 and self.task.dense else self.model.coarse
        logits = call(images, graphs, gsd_m=gsd).float() / self.description.temperature
        if self.task.dense:
            return logits
        n = self.description.tile // self.cell_px
        return logits[:, :, None, None].expand(-1, -1, n, n)


def _turns(images: Tensor, graphs: HeteroData | None) -> Iterator[tuple[Tensor, HeteroData | None, _Turn]]:
    for number in range(8):
        turn = _Turn(bool(number & 1), bool(number & 2), bool(number & 4))
        yield turn.pixels(images), turn.graph(graphs), turn


class _Turn:
    """Transposition, then mirroring along x and along y; called, it turns the answer back."""

    def __init__(self, transpose: bool, along_x: bool, along_y: bool) -> None:
        self.transpose, self.along_x, self.along_y = transpose, along_x, along_y

    def pixels(self, values: Tensor) -> Tensor:
        if self.transpose:
            values = values.transpose(-1, -2)
        dims = [d for d, on in ((-1, self.along_x), (-2, self.along_y)) if on]
        return values.flip(dims) if dims else values

    def __call__(self, values: Tensor) -> Tensor:
        dims = [d for d, on in ((-1, self.along_x), (-2, self.along_y)) if on]
        values = values.flip(dims) if dims else values
        return values.transpose(-1, -2) if self.transpose else values

    def graph(self, graphs: HeteroData | None) -> HeteroData | None:
        if graphs is None:
            return None
        turned = copy.copy(graphs)
        for name in NODE_TYPES:
            store = turned[name]
            store.pos, store.centroid = self._points(store.pos), self._points(store.centroid)
            corners = self._points(store.envelope)  # (N, 4, 2)
            if self.transpose ^ self.along_x ^ self.along_y:
                corners = corners.flip(1)  # a mirrored ring runs the other way round
            # From the highest, leftmost corner on, as the builder keeps them.
            place = (corners * 1e6).round().double()
            first = (place[..., 1] * 1e7 + place[..., 0]).argmin(1)
            order = (first[:, None] + torch.arange(4, device=first.device)) % 4
            store.envelope = corners.gather(1, order[..., None].expand(-1, -1, 2))
        return turned

    def _points(self, points: Tensor) -> Tensor:
        """Return points (..., 2), x then y in 0..1, where the turn puts them."""
        if self.transpose:
            points = points.flip(-1)
        sign = torch.tensor([-1.0 if self.along_x else 1.0, -1.0 if self.along_y else 1.0], device=points.device)
        zero = torch.tensor([float(self.along_x), float(self.along_y)], device=points.device)
        return points * sign + zero
