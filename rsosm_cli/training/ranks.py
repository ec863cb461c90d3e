"""Gradients of several ranks as one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes of gradients that travel in one message: large enough to fill a link, small against the weights.
_MESSAGE_BYTES = 64 << 20


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over ranks; a parameter that got none counts as zero.

    DistributedDataParallel sends gradients while the backward pass still runs. There the contrastive loss sends, too,
    and a rank whose tiles have no object reaches both in another order than the rest: messages would cross. So
    gradients travel after the backward pass, in the order of the parameters, once an update.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    message: list[Tensor] = []
    size = 0
    for p in parameters:
        assert p.grad is not None
        message.append(p.grad)
        size += p.grad.nbytes
        if size >= _MESSAGE_BYTES:
            _average(message)
            message, size = [], 0
    if message:
        _average(message)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
