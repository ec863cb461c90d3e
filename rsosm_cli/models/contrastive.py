"""The symmetric InfoNCE between region encodings and image encodings, over all ranks of a distributed run.

Every loss is scaled so that the mean over ranks of the losses (and so, under DDP, of the gradients) is the loss of the
whole
batch on one device, however objects are spread over the ranks. Collectives run on every rank in every step, so that a
rank without objects cannot make the others wait.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def world() -> tuple[int, int]:
    """Return (rank, size) of the process group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' tensors of equal shape; the gradient of a rank's part is the sum of all ranks' gradients
    of it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        rank, size = world()
        ctx.part = slice(rank * len(values), (rank + 1) * len(values))
        parts = [torch.empty_like(values) for _ in range(size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.part]


def gather(values: Tensor) -> Tensor:
    """Return ``values`` (B, ...) of all ranks, (ranks * B, ...), with gradients; every rank has the same B."""
    return values if world()[1] == 1 else _Gather.apply(values)


def global_count(count: Tensor) -> Tensor:
    """Return the sum of ``count`` over all ranks, without gradient."""
    count = count.detach().clone().float()
    if world()[1] > 1:
        dist.all_reduce(count)
    return count


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count`` such that its mean over ranks is (sum of totals) / (sum of counts); 0 where nothing
    counts.
    """
    return total * world()[1] / global_count(count).clamp(min=1)


def info_nce(images: Tensor, regions: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return the symmetric InfoNCE of pairs ``images``, ``regions`` (B, P); ``valid`` (B,) are tiles that have objects.

    Tiles without objects are neither positives nor negatives: their region encodings would all be one vector.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = F.normalize(images.float(), dim=1)
        regions = F.normalize(regions.float(), dim=1)
        all_images, all_regions = gather(images), gather(regions)
        all_valid = gather(valid.to(images.dtype)) > 0
        labels = torch.arange(len(images), device=images.device) + world()[0] * len(images)
        both = torch.stack((images @ all_regions.T, regions @ all_images.T)) / temperature  # (2, B, ranks * B)
        both = both.masked_fill(~all_valid, -1e9)
        each = F.cross_entropy(both.flatten(0, 1), labels.repeat(2), reduction="none").view(2, -1).mean(0)
        return mean_over_ranks(torch.where(valid, each, 0).sum(), valid.sum())
