"""What the kinds of tasks differ in: the loss, what is kept of a prediction, the metrics, the score of an epoch.

Of every tile one row of numbers is kept, which adds up over processes: a confusion matrix (classes), the predicted
shares (distribution), or the predicted value (regression).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rsosm_cli.models.heads import TaskModel
from rsosm_cli.settings import TaskSettings
from rsosm_cli.training.losses import DistributionLoss, RegressionLoss, SegmentationLoss, class_weights
from rsosm_cli.training.metrics import (
    Metric,
    confusion,
    distribution_metrics,
    regression_metrics,
    segmentation_metrics,
)

# Where metrics are equal (a young head says one class everywhere), the smaller loss is the better epoch.
TIE = 1e-6

Truth = NDArray[np.uint8] | NDArray[np.float64]


class Kind(Protocol):
    """A kind of task. ``T`` tiles; ``truth`` as in :class:`rsosm_cli.training.task_data.TaskTiles`."""

    width: int  # numbers a row

    def loss(self, truth: Truth) -> nn.Module:
        """Return the loss, weighted by the training tiles' ``truth``."""
        ...

    def target(self, model: TaskModel, truth: Tensor) -> Tensor:
        """Return what the loss compares the output with."""
        ...

    def rows(self, model: TaskModel, out: Tensor, truth: Tensor) -> NDArray[np.float64]:
        """Return (B, width) of a batch's output, at the resolution of the truth."""
        ...

    def metrics(self, rows: NDArray[np.float64], truth: Truth, block: NDArray[np.int64]) -> list[Metric]: ...

    def score(self, row: dict[str, float]) -> float:
        """Return what the best epoch has most of, from the validation metrics of one."""
        ...


def kind_of(task: TaskSettings) -> Kind:
    if task.kind == "regression":
        return _Values(task)
    return _Shares(task) if task.kind == "distribution" else _Classes(task)


def main_metrics(task: TaskSettings) -> tuple[str, ...]:
    """Return the metrics that a comparison shows."""
    if task.kind == "regression":
        return ("r2", "mae", "rmse")
    if task.kind == "distribution":
        return ("l1", "kl", "cosine")
    return ("overall_accuracy", "mean_f1") if task.kind == "classification" else ("miou", "mean_f1", "overall_accuracy")


def at_truth(out: Tensor, truth: Tensor) -> Tensor:
    """Return logits (B, K, h, w) at the resolution of the truth (B, H, W); answers of whole tiles as they are."""
    if out.ndim < 4:
        return out
    return functional.interpolate(out.float(), size=truth.shape[1:], mode="bilinear", align_corners=False)


class _Classes:
    """A class a pixel or a tile: confusion matrices."""

    def __init__(self, task: TaskSettings) -> None:
        self.task = task
        self.names = [c.name for c in task.classes]
        self.width = len(self.names) ** 2

    def loss(self, truth: Truth) -> nn.Module:
        if self.task.class_weights == "none":
            return SegmentationLoss(self.task, None)
        counts = np.bincount(np.asarray(truth, np.uint8).ravel(), minlength=256)[: len(self.names)]
        return SegmentationLoss(self.task, class_weights(counts.astype(np.float64)))

    def target(self, model: TaskModel, truth: Tensor) -> Tensor:
        return truth

    def rows(self, model: TaskModel, out: Tensor, truth: Tensor) -> NDArray[np.float64]:
        codes = out.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return confusion(truth.cpu().numpy(), codes, len(self.names)).reshape(len(codes), -1).astype(np.float64)

    def metrics(self, rows: NDArray[np.float64], truth: Truth, block: NDArray[np.int64]) -> list[Metric]:
        k = len(self.names)
        return segmentation_metrics(rows.reshape(-1, k, k).astype(np.int64), block, self.names)

    def score(self, row: dict[str, float]) -> float:
        return row["miou" if self.task.dense else "overall_accuracy"] - TIE * row["loss"]


class _Shares:
    """Shares of the classes in a tile."""

    def __init__(self, task: TaskSettings) -> None:
        self.names = [c.name for c in task.classes]
        self.width = len(self.names)

    def loss(self, truth: Truth) -> nn.Module:
        return DistributionLoss()

    def target(self, model: TaskModel, truth: Tensor) -> Tensor:
        return truth

    def rows(self, model: TaskModel, out: Tensor, truth: Tensor) -> NDArray[np.float64]:
        return np.asarray(out.float().softmax(dim=1).double().cpu())

    def metrics(self, rows: NDArray[np.float64], truth: Truth, block: NDArray[np.int64]) -> list[Metric]:
        return distribution_metrics(np.asarray(truth, np.float64), rows, block, self.names)

    def score(self, row: dict[str, float]) -> float:
        return -row["loss"]


class _Values:
    """A number a tile."""

    width = 1

    def __init__(self, task: TaskSettings) -> None:
        self.task = task

    def loss(self, truth: Truth) -> nn.Module:
        return RegressionLoss(self.task)

    def target(self, model: TaskModel, truth: Tensor) -> Tensor:
        return model.standard(truth)

    def rows(self, model: TaskModel, out: Tensor, truth: Tensor) -> NDArray[np.float64]:
        return np.asarray(model.natural(out.float()).double().cpu())[:, None]

    def metrics(self, rows: NDArray[np.float64], truth: Truth, block: NDArray[np.int64]) -> list[Metric]:
        return regression_metrics(np.asarray(truth, np.float64), rows[:, 0], block)

    def score(self, row: dict[str, float]) -> float:
        return -row["loss"]
