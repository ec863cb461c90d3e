"""Losses of the tasks. Ground without a label never counts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rsosm_cli.settings import TaskSettings

IGNORE = 255
# Focusing of the focal loss (Lin et al. 2017, section 3.2: 2 works best).
FOCAL_GAMMA = 2.0
# Share of a class below which its balanced weight grows no more: a class of a few pixels must not rule the loss.
RAREST_SHARE = 1e-3


def class_weights(counts: NDArray[np.float64]) -> Tensor:
    """Return weights of the classes (K,) from pixel counts: one over the square root of the share, mean 1 over pixels.

    The square root is the usual compromise between "every pixel alike" and "every class alike", under which a rare
    class is predicted far too often. A class without pixels weighs as the rarest.
    """
    share = np.maximum(counts / max(counts.sum(), 1.0), RAREST_SHARE)
    weight = 1 / np.sqrt(share)
    return torch.tensor(weight / (weight * share).sum() * share.sum(), dtype=torch.float32)


class SegmentationLoss(nn.Module):
    """Cross-entropy, focal loss, or soft Dice plus cross-entropy of logits (B, K, H, W) against codes (B, H, W).

    One answer a tile, (B, K) against (B,), is a map of one pixel.
    """

    weights: Tensor | None

    def __init__(self, task: TaskSettings, weights: Tensor | None = None) -> None:
        super().__init__()
        self.kind = task.loss
        self.register_buffer("weights", weights)

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        logits = logits.float()
        truth = truth.long()
        if logits.ndim == 2:
            logits, truth = logits[:, :, None, None], truth[:, None, None]
        labelled = truth != IGNORE
        if not labelled.any():
            return logits.sum() * 0.0  # a batch without labels moves nothing, and is no 0 / 0
        if self.kind == "focal":
            each = functional.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="none")
            weight = (
                torch.ones_like(each) if self.weights is None else self.weights[truth.clamp(max=logits.shape[1] - 1)]
            )
            focal = (1 - torch.exp(-each)) ** FOCAL_GAMMA * each * weight
            return focal[labelled].sum() / weight[labelled].sum()
        loss = functional.cross_entropy(logits, truth, self.weights, ignore_index=IGNORE)
        if self.kind == "dice_cross_entropy":
            loss = loss + dice_loss(logits, truth)
        return loss


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the soft Dice loss (Milletari et al. 2016) over the batch, mean of the classes that are in it."""
    labelled = (truth != IGNORE)[:, None]
    probability = logits.softmax(dim=1) * labelled
    n_classes = logits.shape[1]
    one_hot = functional.one_hot(truth.clamp(max=n_classes - 1), n_classes).movedim(-1, 1) * labelled
    axes = (0, 2, 3)
    both = (probability * one_hot).sum(axes)
    sizes = probability.sum(axes) + one_hot.sum(axes)
    there = one_hot.sum(axes) > 0
    return (1 - 2 * both[there] / sizes[there]).mean()


class DistributionLoss(nn.Module):
    """Kullback-Leibler divergence of shares (B, K) from the softmax of logits (B, K), mean of the tiles (MMGR, 4.3)."""

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        return functional.kl_div(functional.log_softmax(logits.float(), dim=1), truth.float(), reduction="batchmean")


class RegressionLoss(nn.Module):
    """Squared or absolute error of standardised values (B,)."""

    def __init__(self, task: TaskSettings) -> None:
        super().__init__()
        self.absolute = task.loss == "l1"

    def forward(self, predicted: Tensor, truth: Tensor) -> Tensor:
        error = functional.l1_loss if self.absolute else functional.mse_loss
        return error(predicted.float(), truth.float())
