"""MMGR (ISPRS Journal 201, 193-208, 2023): a ResNet and a POI encoder, contrasted over two views of each image.

A cell's points of interest come as category embeddings; their set is read by Set2Set.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsosm_cli.errors import UsageError
from rsosm_cli.models.contrastive import gather, mean_over_ranks, world
from rsosm_cli.models.flat import segment_sum
from rsosm_cli.models.readout import Set2Set


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


@dataclass(frozen=True)
class MmgrEncodings:
    """Of ``B`` cells: the image's pooled features (B, 2048 with ResNet-50), and the points' vector (B, 2 W)."""

    image: Tensor | None = None
    points: Tensor | None = None


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


class Mmgr(nn.Module):
    """The model; ``image_encoder`` is any timm convolutional network, ResNet-50 in the publication."""

    def __init__(
        self,
        image_encoder: str = "resnet50",
        point_width: int = 64,
        *,
        in_chans: int = 3,
        width: int = 128,
        temperature: float = 0.5,
        views_weight: float = 0.5,
        points_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if image_encoder not in timm.list_models():
            raise UsageError(f"timm has no model named {image_encoder!r}.", hint="The publication's is resnet50.")
        self.image_encoder = timm.create_model(image_encoder, pretrained=False, num_classes=0, in_chans=in_chans)
        features = int(self.image_encoder.num_features)  # type: ignore[arg-type]
        self.project = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))
        self.point_encoder = PointEncoder(point_width, 2 * width, width)
        self.temperature = temperature
        self.views_weight, self.points_weight = views_weight, points_weight

    def losses(self, first: Tensor, second: Tensor, points: PointSets) -> MmgrLosses:
        """Return the losses of two augmented views (B, C, H, W) of each image, and of the first with the points."""
        a, b = (self.project(self.image_encoder(view)) for view in (first, second))
        projected = self.point_encoder(points)[1]
        ones = torch.ones_like(points.batch, dtype=torch.float32)
        has_points = segment_sum(ones, points.batch, points.n_cells) > 0
        views = nt_xent(a, b, torch.ones_like(has_points), self.temperature)
        contrast = nt_xent(a, projected, has_points, self.temperature)
        return MmgrLosses(self.views_weight * views + self.points_weight * contrast, views, contrast)

    def encode(self, images: Tensor | None, points: PointSets | None) -> MmgrEncodings:
        """Return the encodings of what is given."""
        return MmgrEncodings(
            None if images is None else self.image_encoder(images),
            None if points is None else self.point_encoder(points)[0],
        )


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
