"""Metrics, their intervals, and losses that ignore what has no label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rsosm_cli.settings import ClassSettings, TaskSettings
from rsosm_cli.training.losses import SegmentationLoss, class_weights, dice_loss
from rsosm_cli.training.metrics import confusion, regression_metrics, segmentation_metrics


def by_name(metrics):
    return {m.name: m for m in metrics}


def test_segmentation_by_hand():
    truth = np.array([[[0, 0, 1, 255]], [[1, 1, 1, 0]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 1]], [[1, 1, 0, 0]]], np.uint8)
    matrices = confusion(truth, predicted, 3)
    assert matrices.sum(axis=(1, 2)).tolist() == [3, 4]
    found = by_name(segmentation_metrics(matrices, np.array([0, 1]), ["a", "b", "c"]))
    assert found["iou/a"].value == pytest.approx(2 / 4)
    assert found["iou/b"].value == pytest.approx(3 / 5)
    assert np.isnan(found["iou/c"].value)
    assert found["miou"].value == pytest.approx((2 / 4 + 3 / 5) / 2)  # an absent class does not enter the mean
    assert found["overall_accuracy"].value == pytest.approx(5 / 7)
    assert found["precision/b"].value == pytest.approx(3 / 4)
    assert found["f1/b"].low <= found["f1/b"].value <= found["f1/b"].high


def test_intervals_are_of_blocks_not_of_tiles():
    rng = np.random.default_rng(0)
    right = rng.random(20) < 0.5  # whole blocks of 50 tiles are right or wrong together
    block = np.repeat(np.arange(20), 50)
    matrices = np.zeros((1000, 2, 2), np.int64)
    matrices[:, 0, 0] = np.where(right[block], 9, 1)
    matrices[:, 0, 1] = 10 - matrices[:, 0, 0]
    by_block, by_tile = (
        by_name(segmentation_metrics(matrices, b, ["a", "b"]))["overall_accuracy"] for b in (block, np.arange(1000))
    )
    assert by_block.high - by_block.low > 5 * (by_tile.high - by_tile.low)


def test_regression_by_hand():
    truth, predicted = np.array([1e6, 2e6, 4e6]), np.array([1e6, 3e6, 3e6])
    found = by_name(regression_metrics(truth, predicted, np.arange(3)))
    spread = ((truth - truth.mean()) ** 2).sum()
    assert found["r2"].value == pytest.approx(1 - 2e12 / spread)
    assert found["mae"].value == pytest.approx(2e6 / 3)
    assert found["rmse"].value == pytest.approx((2e12 / 3) ** 0.5)


def task(loss: str) -> TaskSettings:
    classes = (ClassSettings(name="a", colour="#000000"), ClassSettings(name="b", colour="#ffffff"))
    return TaskSettings(name="t", classes=classes, loss=loss)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "dice_cross_entropy"])
def test_ignored_pixels_have_no_gradient(loss):
    logits = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    truth = torch.randint(0, 2, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    truth[:, 2:] = 255
    value = SegmentationLoss(task(loss), torch.tensor([1.0, 3.0]))(logits, truth)
    value.backward()
    assert value > 0
    assert (logits.grad[:, :, 2:] == 0).all()
    assert (logits.grad[:, :, :2] != 0).any()
    nothing = SegmentationLoss(task(loss))(logits, torch.full((2, 4, 4), 255))
    assert nothing.item() == 0


def test_dice_is_zero_for_the_truth_and_one_for_its_opposite():
    truth = torch.tensor([[[0, 1], [1, 1]]])
    sure = 30.0 * torch.nn.functional.one_hot(truth, 2).movedim(-1, 1).float()
    assert dice_loss(sure, truth).item() == pytest.approx(0, abs=1e-5)
    assert dice_loss(-sure, truth).item() == pytest.approx(1, abs=1e-5)


def test_balanced_weights_favour_the_rare_and_keep_the_scale():
    counts = np.array([9000.0, 1000.0, 0.0])
    weights = class_weights(counts)
    assert weights[1] == pytest.approx(3 * weights[0])
    assert (weights[:2] * torch.tensor([0.9, 0.1])).sum().item() == pytest.approx(1, rel=0.05)
    assert torch.isfinite(weights).all()
