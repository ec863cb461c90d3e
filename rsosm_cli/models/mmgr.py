"""MMGR (ISPRS Journal 201, 193-208, 2023): a ResNet and a POI encoder, contrasted over two views of each image.

A cell's points of interest come as category embeddings; their set is read by Set2Set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from rsosm_cli.errors import UsageError
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.models.batchnorm import over_ranks
from rsosm_cli.models.contrastive import gather, mean_over_ranks, world
from rsosm_cli.models.encodings import Encodings, Pairs, TileEncoder
from rsosm_cli.models.flat import segment_sum
from rsosm_cli.models.readout import Set2Set
from rsosm_cli.settings import MmgrSettings

# Pixels a cell of the four maps that a segmentation reads.
STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class PointSets:
    """Points of ``B`` cells: category embeddings ``x`` (N, W), and the cell of each, ``batch`` (N,)."""

    x: Tensor
    batch: Tensor
    n_cells: int


@dataclass(frozen=True)
class MmgrLosses:
    """The losses of a step, of which the means over ranks are those of the whole batch."""

    total: Tensor
    views: Tensor
    points: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.views, self.points

    @property
    def patches(self) -> None:
        return None

    @property
    def objects(self) -> None:
        return None


class PointEncoder(nn.Module):
    """Set2Set (5 steps) over the points of a cell, then two linear layers: W -> 2 W -> ``hidden`` -> ``width``."""

    def __init__(self, point_width: int = 64, hidden: int = 256, width: int = 128) -> None:
        super().__init__()
        self.read = Set2Set(point_width, n_sets=1)
        self.project = nn.Sequential(nn.Linear(2 * point_width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, points: PointSets) -> tuple[Tensor, Tensor]:
        """Return the vectors of the cells (B, 2 W) and their projections (B, width)."""
        vectors = self.read(points.x, points.batch, points.n_cells)[0]
        return vectors, self.project(vectors)


class Mmgr(TileEncoder):
    """The model. ``image_encoder`` of the settings is any timm network of stages, ResNet-50 in the publication.

    With ``points: cooccurrence`` a point is the number of its category in a table of ``n_categories`` embeddings that
    travels with the weights; with ``text`` it is a vector of ``text_width``.
    """

    METHOD = "mmgr"
    LOSSES = ("views", "points")
    MODALITIES = ("image", "osm")
    # Points are a set: where they lie is not encoded.
    MAPS = ("image",)
    VIEWS = 2
    settings: MmgrSettings
    table: Tensor | None

    def __init__(self, settings: MmgrSettings, text_width: int, n_categories: int = 0) -> None:
        super().__init__()
        self.settings = s = settings
        self.text_width = text_width
        if s.image_encoder not in timm.list_models():
            raise UsageError(f"timm has no model named {s.image_encoder!r}.", hint="The publication's is resnet50.")
        self.backbone = timm.create_model(s.image_encoder, pretrained=False, num_classes=0, in_chans=s.in_chans)
        info = getattr(self.backbone, "feature_info", None)
        stages: list[dict[str, Any]] = info if isinstance(info, list) else []
        reductions = [int(stage["reduction"]) for stage in stages]
        if not all(r in reductions for r in STRIDES) or not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(
                f"{s.image_encoder} has no stages of {', '.join(map(str, STRIDES))} pixels, which maps are made of.",
                hint="Choose a ResNet or another of timm's networks of stages; the publication's is resnet50.",
            )
        # The last stage of each size.
        self._levels = tuple(len(reductions) - 1 - reductions[::-1].index(r) for r in STRIDES)
        self._level_widths = [int(stage["num_chs"]) for stage in stages]
        over_ranks(self.backbone)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.project = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, s.width))
        by_category = s.points == "cooccurrence"
        self.point_width = s.point_width if by_category else text_width
        self.point_encoder = PointEncoder(self.point_width, 2 * s.width, s.width)
        self.register_buffer("table", torch.zeros(n_categories, s.point_width) if by_category else None)

    @property
    def widths(self) -> dict[str, int]:
        return {"image": int(self.backbone.num_features), "osm": 2 * self.point_width}  # type: ignore[arg-type]

    @property
    def stride(self) -> int:
        return STRIDES[-1]

    @property
    def pyramid(self) -> bool:
        return True

    @property
    def image_encoder(self) -> nn.Module:
        return self.backbone

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < self.stride:
            raise UsageError(
                f"An image of {height} x {width} pixels is too small for {self.settings.image_encoder}.",
                hint=f"Choose a size of {self.stride} or more.",
            )
        return -(-height // self.stride), -(-width // self.stride)

    def default_levels(self) -> tuple[int, ...]:
        return self._levels[:-1]

    def level_widths(self, levels: Sequence[int]) -> list[int]:
        return [self._level_widths[level] for level in levels]

    def recompute_blocks(self, on: bool) -> None:
        if on:  # batch norms would count every batch twice
            raise UsageError(
                "MMGR cannot compute blocks again.", hint="Set checkpoint_blocks=false and a smaller batch."
            )

    def unused(self, modality: str, *, maps: bool) -> list[nn.Module | nn.Parameter]:
        if modality == "image":
            return [self.project, self.point_encoder]
        return [self.project, self.backbone, self.point_encoder.project]

    def points_of(self, graphs: HeteroData) -> PointSets:
        """Return all nodes of the graphs as points of their cells; see :class:`rsosm_cli.tiles.tags.TagInputs`."""
        stores = [graphs[name] for name in NODE_TYPES]
        x = torch.cat([s.x for s in stores])
        if self.table is not None:
            x = self.table.index_select(0, x[:, 0].long())
        return PointSets(x, torch.cat([s.batch for s in stores]), int(graphs.n_graphs))

    def step(
        self, images: Tensor, graphs: HeteroData, *, seeds: Tensor, gsd_m: Tensor | None, second: Tensor | None
    ) -> MmgrLosses:
        if second is None:
            raise ValueError("a step of MMGR needs two views of every image")
        return self.losses(images, second, self.points_of(graphs))

    def losses(self, first: Tensor, second: Tensor, points: PointSets) -> MmgrLosses:
        """Return the losses of two augmented views (B, C, H, W) of each image, and of the first with the points."""
        s = self.settings
        a, b = (self.project(self.backbone(view)) for view in (first, second))
        projected = self.point_encoder(points)[1]
        has_points = _present(points)
        views = nt_xent(a, b, torch.ones_like(has_points), s.temperature)
        contrast = nt_xent(a, projected, has_points, s.temperature)
        return MmgrLosses(s.views_weight * views + s.points_weight * contrast, views, contrast)

    def pairs(self, images: Tensor, graphs: HeteroData, gsd_m: Tensor | None) -> Pairs:
        points = self.points_of(graphs)
        return Pairs(self.project(self.backbone(images)), self.point_encoder(points)[1], _present(points))

    def encode(
        self,
        images: Tensor | None,
        graphs: HeteroData | None,
        *,
        maps: bool = False,
        levels: Sequence[int] = (),
        gsd_m: Tensor | float | None = None,
    ) -> Encodings:
        """Return the encodings of what is given; MMGR has none of both fused."""
        osm = None if graphs is None else self.point_encoder(self.points_of(graphs))[0]
        if images is None:
            return Encodings(osm=osm)
        wanted = [*levels, self._levels[-1]]
        network: Any = self.backbone
        last, found = network.forward_intermediates(images, indices=sorted(set(wanted)))
        by_level = dict(zip(sorted(set(wanted)), found, strict=True))
        return Encodings(
            image=network.forward_head(last),
            osm=osm,
            image_map=last if maps else None,
            levels=tuple(by_level[level] for level in levels),
        )


def _present(points: PointSets) -> Tensor:
    """Return (B,) whether a cell has any point."""
    ones = torch.ones_like(points.batch, dtype=torch.float32)
    return segment_sum(ones, points.batch, points.n_cells) > 0


def nt_xent(a: Tensor, b: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return the NT-Xent loss of pairs ``a``, ``b`` (B, W) in its full form, with 2 N - 2 negatives over all ranks.

    Pairs that are not ``valid`` (B,) take no part: cells without points all have one vector.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        every = torch.cat((gather(a), gather(b)))  # (2 N, W)
        n, own = len(every) // 2, world()[0] * len(a) + torch.arange(len(a), device=a.device)
        allowed = gather(valid.float()).repeat(2) > 0
        rows = torch.cat((own, own + n))  # where this rank's vectors stand among all
        scores = torch.cat((a, b)) @ every.T / temperature
        scores = scores.masked_fill(~allowed, -1e9).scatter(1, rows[:, None], float("-inf"))
        each = F.cross_entropy(scores, torch.cat((own + n, own)), reduction="none")
        mine = valid.repeat(2)
        return mean_over_ranks(torch.where(mine, each, 0).sum(), mine.sum())
