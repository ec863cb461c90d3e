"""Batch norm over the batches of all ranks: two ranks with half a batch each train what one with the whole does.

Torch's own runs on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsosm_cli.models.contrastive import world


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class RankBatchNorm(nn.BatchNorm2d):
    """As :class:`torch.nn.BatchNorm2d`; in training, means are over all ranks, whose batches are of one size."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (B, C, H, W)."""
        if not self.training or world()[1] == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            n = world()[1] * wide.numel() // wide.shape[1]
            mean = _Sum.apply(wide.sum((0, 2, 3))) / n
            centred = wide - mean[:, None, None]
            variance = _Sum.apply(centred.square().sum((0, 2, 3))) / n
            scale = self.weight * (variance + self.eps).rsqrt()
            out = centred * scale[:, None, None] + self.bias[:, None, None]
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                share = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * n / max(1, n - 1), share)
                self.num_batches_tracked += 1
        return out.to(x.dtype)


def over_ranks(module: nn.Module) -> nn.Module:
    """Let every plain batch norm inside ``module`` average over all ranks; names of parameters stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = RankBatchNorm
    return module
