"""Metrics with confidence intervals by blocks of ground.

Neighbouring pixels and tiles err together, so intervals come from resampling whole blocks, not pixels: the bootstrap
draws as many blocks as there are, with replacement, and gives the 2.5th and 97.5th percentile of each metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval (NaN where there are fewer than two blocks)."""

    name: str
    value: float
    low: float = float("nan")
    high: float = float("nan")


def confusion(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], n_classes: int, ignore: int = 255
) -> NDArray[np.int64]:
    """Return confusion matrices (T, K, K), truth in rows, of (T, H, W) class maps; ``ignore`` does not count."""
    n_tiles = len(truth)
    counts = truth != ignore
    tile = np.broadcast_to(np.arange(n_tiles).reshape(-1, *(1,) * (truth.ndim - 1)), truth.shape)[counts]
    cell = (tile * n_classes + truth[counts].astype(np.int64)) * n_classes + predicted[counts].astype(np.int64)
    return np.bincount(cell, minlength=n_tiles * n_classes**2).reshape(n_tiles, n_classes, n_classes)


def segmentation_metrics(
    matrices: NDArray[np.int64], block: NDArray[np.int64], classes: Sequence[str], *, seed: int = 0
) -> list[Metric]:
    """Return mIoU, mean F1, overall accuracy and each class's IoU, F1, precision and recall.

    ``matrices`` (T, K, K), truth in rows; ``block`` (T,). A class that is neither there nor predicted has no IoU (NaN)
    and does not enter the means.
    """
    names = ["miou", "mean_f1", "overall_accuracy"]
    names += [f"{what}/{name}" for what in ("iou", "f1", "precision", "recall") for name in classes]
    held = _per_block(matrices.reshape(len(matrices), -1).astype(np.float64), block)
    return _with_intervals(names, held, lambda sums: _from_matrix(sums, len(classes)), seed)


def regression_metrics(
    truth: NDArray[np.float64], predicted: NDArray[np.float64], block: NDArray[np.int64], *, seed: int = 0
) -> list[Metric]:
    """Return r2 (coefficient of determination), MAE and RMSE of (T,) values."""
    error = predicted - truth
    # Moments add up over blocks, so a bootstrap is one matrix product. Centred first: r2 subtracts large numbers.
    centred = truth - truth.mean()
    moments = np.column_stack([np.ones(len(truth)), centred, centred**2, np.abs(error), error**2])
    return _with_intervals(["r2", "mae", "rmse"], _per_block(moments, block), _from_moments, seed)


def distribution_metrics(
    truth: NDArray[np.float64], predicted: NDArray[np.float64], block: NDArray[np.int64], classes: Sequence[str], *,
    seed: int = 0,
) -> list[Metric]:  # fmt: skip
    """Return L1, KL divergence and cosine of shares (T, K), means of the tiles (MMGR, 4.3), and each class's error.

    L1 is the sum over the classes of absolute differences (0 to 2); KL is that of the truth from the prediction;
    ``mae/<class>`` is the mean absolute difference of one class.
    """
    apart = np.abs(predicted - truth)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(truth > 0, truth * np.log(truth / np.maximum(predicted, 1e-9)), 0).sum(axis=1)
    both = np.linalg.norm(truth, axis=1) * np.linalg.norm(predicted, axis=1)
    cosine = (truth * predicted).sum(axis=1) / np.maximum(both, 1e-12)
    kept = np.column_stack([np.ones(len(truth)), apart.sum(axis=1), kl, cosine, apart])
    names = ["l1", "kl", "cosine", *(f"mae/{name}" for name in classes)]
    return _with_intervals(names, _per_block(kept, block), lambda sums: sums[:, 1:] / sums[:, :1], seed)


def _from_matrix(sums: NDArray[np.float64], n_classes: int) -> NDArray[np.float64]:
    matrix = sums.reshape(-1, n_classes, n_classes)  # (B, K, K)
    hit = np.diagonal(matrix, axis1=1, axis2=2)
    there, said = matrix.sum(axis=2), matrix.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hit / (there + said - hit)
        f1 = 2 * hit / (there + said)
        overall = hit.sum(axis=1) / there.sum(axis=1)
        per_class = [iou, f1, hit / said, hit / there]
    return np.column_stack([_mean(iou), _mean(f1), overall, *per_class])


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=1) / known.sum(axis=1)


def _from_moments(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    n, y, yy, absolute, squared = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = yy - y**2 / n
        r2 = np.where(spread > 0, 1 - squared / spread, np.nan)
        return np.column_stack([r2, absolute / n, np.sqrt(squared / n)])


def _per_block(rows: NDArray[np.float64], block: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sums of ``rows`` (T, M) over each block, (B, M)."""
    found, where = np.unique(block, return_inverse=True)
    sums = np.zeros((len(found), rows.shape[1]))
    np.add.at(sums, where.ravel(), rows)
    return sums


def _with_intervals(
    names: Sequence[str],
    held: NDArray[np.float64],
    measure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int,
) -> list[Metric]:
    value = measure(held.sum(axis=0)[None])[0]
    n_blocks = len(held)
    if n_blocks < 2:
        return [Metric(name, float(v)) for name, v in zip(names, value, strict=True)]
    drawn = np.random.default_rng(seed).multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), BOOTSTRAP_DRAWS)
    draws = measure(drawn.astype(np.float64) @ held)  # (draws, M)
    low, high = np.full(len(names), np.nan), np.full(len(names), np.nan)
    known = np.isfinite(draws).any(axis=0) & np.isfinite(value)
    low[known], high[known] = np.nanpercentile(draws[:, known], [2.5, 97.5], axis=0)
    return [Metric(n, float(v), float(a), float(b)) for n, v, a, b in zip(names, value, low, high, strict=True)]
