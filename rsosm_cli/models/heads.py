"""Heads for tasks: classes of the pixels, a class, shares or a number a tile; from image, objects, or both fused.

GeoLink (NeurIPS 2025), section 4: UPerNet (Xiao et al., ECCV 2018) on three inner blocks of the ViT and its last,
where the hybrid patches stand in its place when both modalities are seen; a two-layer MLP for regression.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from rsosm_cli.models.encodings import TileEncoder, check_modality
from rsosm_cli.settings import TaskSettings

DROPOUT = 0.1  # before the last layer of a segmentation head, as in UPerNet


class TaskModel(nn.Module):
    """An encoder and the head of a task.

    Change: the images of two dates lie one after the other along the bands, (B, 2C, H, W). Both go through the one
    encoder, and the head reads the later map beside its difference from the earlier.

    A segmentation from the objects alone looks at no pixel: in place of the image's patches, one learned vector on
    every place of the grid, told apart by the position embedding, queries the objects in the fusion block. (With
    `fusion_position` off such a map is flat.)
    """

    target: Tensor

    def __init__(self, encoder: TileEncoder, task: TaskSettings, *, levels: Sequence[int] | None = None) -> None:
        super().__init__()
        check_modality(type(encoder), task)
        self.encoder = encoder
        self.task = task
        self.levels = tuple(levels if levels is not None else encoder.default_levels())
        last = encoder.widths[task.modality]
        self.query: nn.Parameter | None = None
        self.head: nn.Module
        if task.dense:
            if task.modality == "osm":
                last = encoder.widths["fused"]
                self.query = nn.Parameter(torch.randn(last) * 0.02)
                inner = [last] * len(self.levels)
            else:
                inner = encoder.level_widths(self.levels)
            widths = [task.images * width for width in (*inner, last)]
            self.head = _segmentation_head(task, widths, pyramid=encoder.pyramid)
        else:
            self.head = _tile_head(task, last, 1 if task.kind == "regression" else len(task.classes))
        if task.kind == "regression":
            # Mean and standard deviation of the training targets: the head learns values of size 1.
            self.register_buffer("target", torch.tensor([0.0, 1.0]))
        # A distributed run waits for every trained parameter.
        for part in encoder.unused(task.modality, maps=task.dense):
            part.requires_grad_(False)

    @property
    def stride(self) -> int:
        """Pixels a cell of :meth:`coarse`, along one side."""
        if self.task.dense and self.task.decoder == "upernet":
            return self.encoder.stride // (8 if self.encoder.pyramid else 4)
        return self.encoder.stride

    def forward(
        self, images: Tensor | None, graphs: HeteroData | None, *, gsd_m: Tensor | float | None = None
    ) -> Tensor:
        """Return logits (B, K, H, W) at the tile's resolution, logits (B, K) of a tile, or values (B,)."""
        out = self.coarse(images, graphs, gsd_m=gsd_m)
        if not self.task.dense:
            return out
        height, width = self._size(images)
        return F.interpolate(out, size=(height, width), mode="bilinear", align_corners=False)

    def coarse(
        self, images: Tensor | None, graphs: HeteroData | None, *, gsd_m: Tensor | float | None = None
    ) -> Tensor:
        """Return logits (B, K, H / stride, W / stride) as the head makes them, (B, K) of a tile, or values (B,)."""
        out = self.decode(self.features(images, graphs, gsd_m=gsd_m))
        return self.natural(out) if self.task.kind == "regression" else out

    def features(
        self, images: Tensor | None, graphs: HeteroData | None, *, gsd_m: Tensor | float | None = None
    ) -> list[Tensor]:
        """Return what the head reads: maps (B, D, h, w), the last one last, or one vector (B, D) of a tile."""
        if not self.task.dense:
            return [self._vectors(images, graphs, gsd_m)]
        if self.task.kind != "change":
            return self._maps(images, graphs, gsd_m)
        assert images is not None
        before, after = (self._maps(half, graphs, gsd_m) for half in images.chunk(2, dim=1))
        return [torch.cat((b, b - a), 1) for a, b in zip(before, after, strict=True)]

    def decode(self, features: list[Tensor]) -> Tensor:
        """Return logits (B, K, H / stride, W / stride) or (B, K), or values (B,) in units of the training targets'
        spread.
        """
        if self.task.kind == "regression":
            return self.head(features[0])[:, 0]
        return self.head(features if self.task.dense else features[0])

    def set_target(self, mean: float, std: float) -> None:
        """Set the moments of the training targets (of ln(1 + value) with ``log_target``)."""
        self.target.copy_(torch.tensor([mean, std]))

    def standard(self, values: Tensor) -> Tensor:
        """Return values (B,) in units of the training targets' spread: what the loss compares."""
        fitted = values.clamp(min=0).log1p() if self.task.log_target else values
        return (fitted - self.target[0]) / self.target[1]

    def natural(self, standard: Tensor) -> Tensor:
        """Return values (B,) in the unit of the task, the reverse of :meth:`standard`."""
        fitted = standard * self.target[1] + self.target[0]
        return fitted.expm1().clamp(min=0) if self.task.log_target else fitted

    def _size(self, images: Tensor | None) -> tuple[int, int]:
        side = self.encoder.settings.image_size
        return (side, side) if images is None else (images.shape[2], images.shape[3])

    def _vectors(self, images: Tensor | None, graphs: HeteroData | None, gsd_m: Tensor | float | None) -> Tensor:
        if self.task.modality == "osm":
            found = self.encoder.encode(None, graphs).osm
        elif self.task.modality == "image":
            found = self.encoder.encode(images, None, gsd_m=gsd_m).image
        else:
            found = self.encoder.encode(images, graphs, gsd_m=gsd_m).fused
        if found is None:
            raise ValueError(f"a head of modality {self.task.modality} was given no {self._wanted()}")
        return found

    def _maps(self, images: Tensor | None, graphs: HeteroData | None, gsd_m: Tensor | float | None) -> list[Tensor]:
        """Return the maps (B, D, h, w) that the head reads, the last one last."""
        inner = self.levels if self.task.decoder == "upernet" else ()
        if self.task.modality == "osm":
            if graphs is None:
                raise ValueError("a head of modality osm was given no graphs")
            assert self.query is not None
            last = self.encoder.map_of_objects(self.query, graphs, *self.encoder.check_size(*self._size(images)))
            if last is None:
                raise ValueError(f"{self.encoder.METHOD} has no map of the OSM objects")
            return [last] * (len(inner) + 1)
        image_only = self.task.modality == "image"
        found = self.encoder.encode(images, None if image_only else graphs, maps=True, levels=inner, gsd_m=gsd_m)
        last_map = found.image_map if image_only else found.fused_map
        if last_map is None:
            raise ValueError(f"a head of modality {self.task.modality} was given no {self._wanted()}")
        return [*found.levels, last_map]

    def _wanted(self) -> str:
        return {"osm": "graphs", "image": "images", "fused": "images or no graphs"}[self.task.modality]


class _LastMap(nn.Module):
    """A head that reads the last map alone, through 1 x 1 convolutions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.layers(maps[-1])


def _segmentation_head(task: TaskSettings, widths: list[int], *, pyramid: bool) -> nn.Module:
    n_classes = len(task.classes)
    if task.decoder == "linear":
        return _LastMap(nn.Conv2d(widths[-1], n_classes, 1))
    if task.decoder == "mlp":
        return _LastMap(
            nn.Conv2d(widths[-1], task.decoder_width, 1), nn.GELU(), nn.Dropout2d(DROPOUT),
            nn.Conv2d(task.decoder_width, n_classes, 1),
        )  # fmt: skip
    return UperNet(widths, n_classes, task.decoder_width, pyramid=pyramid)


def _tile_head(task: TaskSettings, width: int, out: int) -> nn.Module:
    """UPerNet is for maps: one answer a tile comes, with it as with `mlp`, from the paper's two-layer MLP."""
    if task.decoder == "linear":
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that trains on a single value a channel, as the 1 x 1 pooling of a single tile has, with its running
    statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def _conv(n_in: int, n_out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2), _BatchNorm(n_out), nn.ReLU())


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class UperNet(nn.Module):
    """Four maps of one grid, rescaled by 4, 2, 1 and 1/2, or a ``pyramid`` of maps as it is; pyramid pooling of the
    last; a top-down path; logits on the grid of the first.
    """

    SCALES = (1, 2, 3, 6)  # cells a side of the pyramid's pools

    def __init__(self, widths: Sequence[int], n_classes: int, channels: int, *, pyramid: bool = False) -> None:
        super().__init__()
        a, b = widths[0], widths[1]
        self.rescale = (
            nn.ModuleList(nn.Identity() for _ in widths)
            if pyramid
            else nn.ModuleList(
                (
                    nn.Sequential(
                        nn.ConvTranspose2d(a, a, 2, 2), _BatchNorm(a), nn.GELU(), nn.ConvTranspose2d(a, a, 2, 2)
                    ),
                    nn.ConvTranspose2d(b, b, 2, 2),
                    nn.Identity(),
                    nn.MaxPool2d(2, ceil_mode=True),
                )
            )
        )
        self.pools = nn.ModuleList(_conv(widths[3], channels, 1) for _ in self.SCALES)
        self.bottleneck = _conv(widths[3] + len(self.SCALES) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for width in widths[:3])
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in widths[:3])
        self.merge = _conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classify = nn.Conv2d(channels, n_classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        maps = [rescale(x) for rescale, x in zip(self.rescale, maps, strict=True)]
        top = maps[3]
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(top, scale)), top)
            for conv, scale in zip(self.pools, self.SCALES, strict=True)
        ]
        ways = [conv(x) for conv, x in zip(self.lateral, maps[:3], strict=True)]
        ways.append(self.bottleneck(torch.cat((top, *pooled), 1)))
        for level in (2, 1, 0):
            ways[level] = ways[level] + _resize(ways[level + 1], ways[level])
        out = [conv(x) for conv, x in zip(self.smooth, ways[:3], strict=True)] + [ways[3]]
        merged = self.merge(torch.cat([out[0]] + [_resize(x, out[0]) for x in out[1:]], 1))
        return self.classify(self.dropout(merged))
