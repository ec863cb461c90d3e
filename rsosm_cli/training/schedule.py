"""Learning rate and optimiser of every training; the rate changes with every update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rsosm_cli.settings import OptimSettings

# The batch that base learning rates are stated at (MAE, and GeoLink's appendix).
REFERENCE_BATCH = 256


def scaled_lr(settings: OptimSettings, batch_size: int) -> float:
    """Return the peak learning rate for ``batch_size`` samples an update."""
    return settings.lr * batch_size / REFERENCE_BATCH


def lr_factor(update: int, warmup: int, total: int, falls: Sequence[float] = ()) -> float:
    """Return the share of the peak learning rate at ``update`` (from 0) of ``total``.

    After a linear warm-up a cosine to zero; or, where there are any, a tenth from each of the updates ``falls`` on.
    """
    if update < warmup:
        return (update + 1) / warmup
    if falls:
        return 0.1 ** sum(update >= fall for fall in falls)
    done = (update - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to ``lr`` times the group's own ``lr_scale`` (1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, **extra: Any) -> list[dict[str, Any]]:
    """Return parameter groups with no weight decay on biases, norms and tokens (one axis wider than 1)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        vector = sum(size > 1 for size in parameter.shape) <= 1
        (plain if vector or name.endswith("bias") else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, **extra},
        {"params": plain, "weight_decay": 0.0, **extra},
    ]
    return [g for g in groups if g["params"]]


def falls_of(settings: OptimSettings, updates_an_epoch: float) -> tuple[float, ...]:
    """Return the updates from which on the rate is a tenth of what it was; none with a cosine."""
    if settings.schedule != "step":
        return ()
    return tuple(milestone * updates_an_epoch for milestone in settings.milestones)


def optimizer_of(groups: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    """Return the optimiser over ``groups``; the rate is set before every update by :func:`set_lr`."""
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    # Fused: one pass over the weights, where torch's loops make ten; a fifth of the time with ViT-Base on a CPU.
    return kind(groups, lr=settings.lr, betas=settings.betas, fused=True)
