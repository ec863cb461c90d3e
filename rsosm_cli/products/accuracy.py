"""Accuracy and area from a stratified random sample: Olofsson et al. 2014 (Remote Sensing of Environment 148, 42-57).

Strata are the classes of the map. Equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError

DRAWS = 1000  # resamples of the blocks
Z95 = 1.96  # the normal quantile that the paper uses for its 95 % intervals


@dataclass(frozen=True)
class Estimate:
    """A value and the half width of its 95 % interval (NaN where the sample is too small to tell)."""

    value: float
    margin: float


@dataclass(frozen=True)
class Assessment:
    """Area-adjusted accuracy of a map of ``K`` classes."""

    classes: tuple[str, ...]
    matrix: NDArray[np.int64]  # (K, K) sample counts, map class in rows, reference class in columns
    proportions: NDArray[np.float64]  # (K, K) estimated shares of the area, equation 4
    overall: Estimate
    users: tuple[Estimate, ...]
    producers: tuple[Estimate, ...]
    areas: tuple[Estimate, ...]  # in the unit of the map areas given
    mapped_areas: tuple[float, ...]


def assess(matrix: NDArray[np.int64], mapped_areas: Sequence[float], classes: Sequence[str]) -> Assessment:
    """Return the area-adjusted assessment of sample counts (K, K), map class in rows.

    ``mapped_areas`` (K,) is the area of each map class, in any unit. Classes that are not in the map need no points.
    Raises :class:`UsageError` for a mapped class without points.
    """
    return assess_strata(np.asarray(matrix)[None], np.asarray(mapped_areas, np.float64)[None], classes, [""])


def assess_strata(
    counts: NDArray[np.int64], mapped_areas: NDArray[np.float64], classes: Sequence[str], regions: Sequence[str]
) -> Assessment:
    """Return the assessment of a sample that is stratified by region and map class: counts (R, K, K), areas (R, K).

    With one region, the equations are those of Olofsson et al.; with several, each stratum is a map class of a region,
    and the ratios of user's and producer's accuracy are over all of them (Stehman 2014, International Journal of Remote
    Sensing 35, equations 27 to 32). Raises :class:`UsageError` for a stratum that is mapped and has no points.
    """
    n = np.asarray(counts, dtype=np.float64)
    area = np.asarray(mapped_areas, dtype=np.float64)
    drawn = n.sum(axis=2)  # (R, K) points a stratum
    empty = [
        f"{classes[k]} of {regions[r]}" if regions[r] else classes[k]
        for r, k in np.argwhere((area > 0) & (drawn == 0)).tolist()
    ]
    if empty:
        raise UsageError(
            f"No reference point lies in the map class{'es' if len(empty) > 1 else ''} {', '.join(empty)}: the sample "
            "cannot say how accurate they are.",
            hint="Draw a stratified sample of this map: rsosm evaluate TASK --city NAME --sample 300",
            classes=empty,
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(drawn[..., None] > 0, n / drawn[..., None], 0.0)  # (R, K, K) of each stratum
        # One point in a stratum has no variance that could be estimated.
        spread = np.where(drawn[..., None] > 1, share * (1 - share) / (drawn[..., None] - 1), np.nan)
        spread = np.where(area[..., None] > 0, spread, 0.0)
        weight = area / area.sum()  # (R, K)
        proportions = (weight[..., None] * share).sum(axis=0)  # equation 4
        squared = weight[..., None] ** 2 * spread  # (R, K, K) variance of each weighted share
        hit = np.diagonal(squared, axis1=1, axis2=2).sum(axis=0)  # (K,) of the diagonal
        overall = float(np.diag(proportions).sum())  # equation 1
        overall_variance = float(hit.sum())  # equation 5
        mapped = weight.sum(axis=0)
        seen = drawn.sum(axis=0) > 0
        users = np.where(seen & (mapped > 0), np.diag(proportions) / mapped, np.nan)  # equation 2
        if len(n) == 1:  # also of a class whose area is 0 but that has points
            users = np.where(drawn[0] > 0, np.diag(share[0]), np.nan)
        users_variance = np.where(np.isfinite(users), hit / np.where(mapped > 0, mapped, 1) ** 2, np.nan)  # equation 6
        reference = proportions.sum(axis=0)
        producers = np.diag(proportions) / reference  # equation 3
        # Equation 7, with the area shares in place of the pixel numbers (both sides are divided by the square of N).
        columns = squared.sum(axis=0)  # (K, K)
        others = columns.sum(axis=0) - np.diag(columns)
        producers_variance = (hit * (1 - producers) ** 2 + producers**2 * others) / reference**2
        areas_variance = columns.sum(axis=0)  # equation 10
    total = area.sum()
    return Assessment(
        tuple(classes),
        np.asarray(counts, dtype=np.int64).sum(axis=0),
        proportions,
        Estimate(overall, Z95 * overall_variance**0.5),
        _estimates(users, users_variance),
        _estimates(producers, producers_variance),
        _estimates(reference * total, areas_variance * total**2),  # equations 9 and 11
        tuple(float(a) for a in area.sum(axis=0)),
    )


def assess_blocks(
    matrices: NDArray[np.int64], mapped_areas: Sequence[float], classes: Sequence[str], *, seed: int = 0
) -> Assessment | None:
    """Return the area-adjusted assessment of pixels in ``B`` blocks of ground: counts (B, K, K), map class in rows.

    Neighbouring pixels err together, so the intervals resample whole blocks; a margin is half of such an interval. None
    where a mapped class has no labelled pixel: its ground cannot be adjusted for.
    """
    area = np.asarray(mapped_areas, dtype=np.float64)
    counts = matrices.sum(axis=0)
    if ((area > 0) & (counts.sum(axis=1) == 0)).any():
        return None
    k, blocks = len(area), len(matrices)
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), DRAWS)
    # The last row is the estimate itself; the others are resamples.
    sums = np.concatenate([drawn @ matrices.reshape(blocks, -1), counts.reshape(1, -1)]).reshape(-1, k, k)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = sums / sums.sum(axis=2, keepdims=True)
        p = np.where(area[:, None] > 0, (area / area.sum())[:, None] * share, 0.0)  # (D + 1, K, K)
        diagonal = np.diagonal(p, axis1=1, axis2=2)
        found = np.concatenate(
            [
                diagonal.sum(axis=1, keepdims=True), np.diagonal(share, axis1=1, axis2=2),
                diagonal / p.sum(axis=1), p.sum(axis=1) * area.sum(),
            ],
            axis=1,
        )  # fmt: skip
    margins = np.full(found.shape[1], np.nan)
    if blocks > 1:
        known = np.isfinite(found[:-1]).any(axis=0)
        low, high = np.nanpercentile(found[:-1][:, known], [2.5, 97.5], axis=0)
        margins[known] = (high - low) / 2
    every = [Estimate(float(v), float(m)) for v, m in zip(found[-1], margins, strict=True)]
    return Assessment(
        tuple(classes), counts, p[-1], every[0], tuple(every[1 : k + 1]), tuple(every[k + 1 : 2 * k + 1]),
        tuple(every[2 * k + 1 :]), tuple(area.tolist()),
    )  # fmt: skip


def _estimates(values: NDArray[np.float64], variances: NDArray[np.float64]) -> tuple[Estimate, ...]:
    margins = Z95 * np.sqrt(variances)
    return tuple(Estimate(float(v), float(m)) for v, m in zip(values, margins, strict=True))


def allocate(n_points: int, mapped_areas: Sequence[float]) -> NDArray[np.int64]:
    """Return how many of ``n_points`` each class gets: half of them alike, half in proportion to area.

    Proportion alone leaves rare classes without points, equal numbers waste them on rare classes (section 5.1.2 of the
    paper recommends a mixture). Classes without area get none, every other two at least.
    """
    area = np.asarray(mapped_areas, dtype=np.float64)
    there = area > 0
    if n_points < 2 * there.sum():
        raise UsageError(
            f"{n_points} points are too few for the {int(there.sum())} classes of the map.",
            hint=f"Draw {int(2 * there.sum())} or more; 300 is a usual start.",
        )
    wanted = n_points * np.where(there, 0.5 / there.sum() + 0.5 * area / area.sum(), 0.0)
    wanted = np.where(there, np.maximum(wanted, 2), 0)
    drawn = np.floor(wanted * (n_points / wanted.sum())).astype(np.int64)
    drawn = np.where(there, np.maximum(drawn, 2), 0)
    while drawn.sum() != n_points:  # a handful of steps: rounding only
        lacking = wanted - drawn
        if drawn.sum() < n_points:
            drawn[np.where(there, lacking, -np.inf).argmax()] += 1
        else:
            drawn[np.where(drawn > 2, lacking, np.inf).argmin()] -= 1
    return drawn
