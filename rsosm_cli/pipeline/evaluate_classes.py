"""Classes of a map against reference pixels or points: the error matrix, and accuracy adjusted for the areas mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import MissingError
from rsosm_cli.settings import TaskSettings

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.products.accuracy import Assessment
    from rsosm_cli.products.reference import MapRaster
    from rsosm_cli.tiles.labels import Labels
    from rsosm_cli.training.metrics import Metric

# Below these, the intervals say less than they seem to: Olofsson et al. (section 5.1.2) take 50 points a class and
# more, and percentiles of resamples of a handful of blocks are too narrow.
FEW_POINTS, FEW_BLOCKS = 20, 10


@dataclass(frozen=True)
class Work:
    """One evaluation. ``suffix`` keeps the files of one way of assessing from those of another."""

    raster: MapRaster
    task: TaskSettings
    folder: Path
    stem: str
    notes: list[str]
    suffix: str = ""

    def file(self, ending: str) -> Path:
        return self.folder / f"{self.stem}.{ending}"

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.task.classes]


@dataclass(frozen=True)
class Found:
    """What an evaluation found. ``matrix`` (K, K): map class in rows; pixels, or points."""

    numbers: dict[str, Any]
    metrics: Sequence[Metric] = ()
    matrix: NDArray[np.int64] | None = None
    unit: str = ""
    assessment: Assessment | None = None


def against_pixels(work: Work, labels: Labels, exclude: Geometry | None) -> Found:
    """Compare all pixels on labelled ground; intervals by blocks of ground."""
    from rsosm_cli.products.accuracy import assess_blocks
    from rsosm_cli.products.reference import class_pixels, compare, require_pixels
    from rsosm_cli.training.metrics import segmentation_metrics

    matrices = compare(work.raster, labels, exclude)  # labels in rows
    if exclude is not None and not len(matrices):
        require_pixels(0, work.raster, excluded=len(compare(work.raster, labels, None)) > 0)
    require_pixels(len(matrices), work.raster, excluded=False)
    total = int(matrices.sum())
    work.notes.append(
        f"{total:,} labelled pixels ({total * work.raster.pixel_m2 / 1e6:.3f} km2) in {len(matrices)} blocks of ground "
        "were compared."
    )
    if len(matrices) < FEW_BLOCKS:
        work.notes.append(
            f"The labels lie in {len(matrices)} block{'s' if len(matrices) > 1 else ''} of ground: too few for the "
            "intervals to be trusted."
        )
    numbers: dict[str, Any] = {"pixels": total}
    areas = class_pixels(work.raster, exclude) * work.raster.pixel_m2
    by_map = matrices.transpose(0, 2, 1)
    assessment = assess_blocks(by_map, areas.tolist(), work.names)
    if assessment is None:
        lacking = [n for n, a, c in zip(work.names, areas, by_map.sum(axis=(0, 2)), strict=True) if a > 0 and c == 0]
        work.notes.append(
            f"No labelled pixel lies in the map class{'es' if len(lacking) > 1 else ''} {', '.join(lacking)}, so "
            "accuracy cannot be adjusted for the areas mapped."
        )
    else:
        work.notes.append(
            "User's and producer's accuracy and the areas take the labelled ground for a random sample of the map "
            "within each class; where it was chosen otherwise, they hold for it alone."
        )
        put_assessment(numbers, assessment, overall="area_adjusted_accuracy")
    metrics = segmentation_metrics(matrices, np.arange(len(matrices)), work.names)
    return Found(numbers, metrics, by_map.sum(axis=0), "pixels", assessment)


def against_points(work: Work, labels: Labels, exclude: Geometry | None) -> Found:
    """Take points for a sample that is random within each class of the map (Olofsson et al. 2014)."""
    import shapely

    from rsosm_cli.products.accuracy import assess
    from rsosm_cli.products.reference import class_pixels, classes_at, require_pixels
    from rsosm_cli.tiles.label_files import IGNORE

    raster, k = work.raster, len(work.task.classes)
    geometry, codes = labels.points()
    if not len(geometry):
        names = ", ".join(layer.name for layer in labels.layers)
        classes = ", ".join(c.name for c in work.task.classes)
        raise MissingError(
            f"No point of {names} has a class.", hint=f"Fill in the column `class` with one of: {classes}."
        )
    xy = shapely.get_coordinates(shapely.centroid(geometry))
    mapped = classes_at(raster, xy)
    used = mapped != IGNORE
    outside = int((~used).sum())
    if exclude is not None:
        trained = shapely.contains_xy(exclude, xy[:, 0], xy[:, 1])
        if (used & trained).any():
            work.notes.append(
                f"{int((used & trained).sum())} of {len(xy)} points lie on training ground and are left out; so is "
                "that ground from the areas."
            )
        require_pixels(int((used & ~trained).sum()), raster, excluded=bool((used & trained).any()))
        used &= ~trained
    require_pixels(int(used.sum()), raster, excluded=False)
    if outside:
        work.notes.append(f"{outside} points lie outside the map.")
    matrix = np.bincount(mapped[used].astype(np.int64) * k + codes[used].astype(np.int64), minlength=k * k)
    matrix = matrix.reshape(k, k)
    areas = class_pixels(raster, exclude) * raster.pixel_m2
    assessment = assess(matrix, areas.tolist(), work.names)
    work.notes.append(
        "The points are taken as a random sample within each class of the map (Olofsson et al. 2014), as "
        "`rsosm evaluate --sample` draws them; other points give no honest intervals."
    )
    if note := few_points(matrix, work.names):
        work.notes.append(note)
    numbers: dict[str, Any] = {"points": int(used.sum())}
    put_assessment(numbers, assessment)
    return Found(numbers, (), matrix, "points", assessment)


def few_points(matrix: NDArray[np.int64], names: Sequence[str]) -> str:
    """Return a sentence on the map classes whose points are too few for an interval; empty where there is none."""
    drawn = matrix.sum(axis=1)
    few = [f"{name} ({n})" for name, n in zip(names, drawn.tolist(), strict=True) if 0 < n < FEW_POINTS]
    if not few:
        return ""
    return (
        f"Too few points for intervals that can be trusted lie in the map class{'es' if len(few) > 1 else ''} "
        f"{', '.join(few)}: {FEW_POINTS} or better 50 each are wanted."
    )


def put_assessment(numbers: dict[str, Any], found: Assessment, overall: str = "overall_accuracy") -> None:
    _put(numbers, overall, found.overall.value, found.overall.margin)
    for i, name in enumerate(found.classes):
        _put(numbers, f"users/{name}", found.users[i].value, found.users[i].margin)
        _put(numbers, f"producers/{name}", found.producers[i].value, found.producers[i].margin)
        _put(numbers, f"area_m2/{name}", found.areas[i].value, found.areas[i].margin, digits=0)
        numbers[f"mapped_m2/{name}"] = round(found.mapped_areas[i])
        p = found.proportions
        both = p[i].sum() + p[:, i].sum()
        if both > 0 and overall == "overall_accuracy":
            numbers[f"f1/{name}"] = round(float(2 * p[i, i] / both), 4)
            numbers[f"iou/{name}"] = round(float(p[i, i] / (both - p[i, i])), 4)


def _put(numbers: dict[str, Any], name: str, value: float, margin: float, digits: int = 4) -> None:
    if np.isfinite(value):
        numbers[name] = round(value, digits)
    if np.isfinite(margin):
        numbers[f"{name}_margin"] = round(margin, digits)
