"""Accuracy and area from a stratified random sample: Olofsson et al. 2014 (Remote Sensing of Environment 148, 42-57).

Strata are the classes of the map. Equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import UsageError

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
    counts = np.asarray(matrix, dtype=np.float64)
    area = np.asarray(mapped_areas, dtype=np.float64)
    drawn = counts.sum(axis=1)
    empty = [name for name, n, a in zip(classes, drawn, area, strict=True) if a > 0 and n == 0]
    if empty:
        raise UsageError(
            f"No reference point lies in the map class{'es' if len(empty) > 1 else ''} {', '.join(empty)}: the sample "
            "cannot say how accurate they are.",
            hint="Draw a stratified sample of this map: rsosm evaluate TASK --city NAME --sample 300",
            classes=empty,
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(drawn[:, None] > 0, counts / drawn[:, None], 0.0)  # (K, K) of each stratum
        # One point in a stratum has no variance that could be estimated.
        spread = np.where(drawn[:, None] > 1, share * (1 - share) / (drawn[:, None] - 1), np.nan)
        spread = np.where(area[:, None] > 0, spread, 0.0)
        weight = area / area.sum()
        proportions = weight[:, None] * share  # equation 4
        hit = np.diag(share)
        overall = float(np.diag(proportions).sum())  # equation 1
        overall_variance = float((weight**2 * np.diag(spread)).sum())  # equation 5
        users = np.where(drawn > 0, hit, np.nan)  # equation 2
        users_variance = np.where(drawn > 0, np.diag(spread), np.nan)  # equation 6
        reference = proportions.sum(axis=0)
        producers = np.diag(proportions) / reference  # equation 3
        # Equation 7, with the area shares in place of the pixel numbers (both sides are divided by the square of N).
        others = weight[:, None] ** 2 * spread
        others = others.sum(axis=0) - np.diag(others)
        producers_variance = (weight**2 * (1 - producers) ** 2 * np.diag(spread) + producers**2 * others) / reference**2
        areas_variance = (weight[:, None] ** 2 * spread).sum(axis=0)  # equation 10
    total = area.sum()
    return Assessment(
        tuple(classes),
        np.asarray(matrix, dtype=np.int64),
        proportions,
        Estimate(overall, Z95 * overall_variance**0.5),
        _estimates(users, users_variance),
        _estimates(producers, producers_variance),
        _estimates(reference * total, areas_variance * total**2),  # equations 9 and 11
        tuple(float(a) for a in area),
    )


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
