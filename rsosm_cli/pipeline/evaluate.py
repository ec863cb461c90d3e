"""``evaluate``: a finished map against reference labels, and the points to interpret for an accuracy assessment."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import MissingError, RsosmError, UsageError
from rsosm_cli.geometry import WGS84
from rsosm_cli.pipeline.result import Result
from rsosm_cli.presets import preset_names
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import TaskSettings, dump, resolve
from rsosm_cli.workspace import Workspace, atomic, write_json, write_text

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.models.checkpoint import Description
    from rsosm_cli.products.accuracy import Assessment
    from rsosm_cli.products.reference import MapRaster
    from rsosm_cli.tiles.labels import Extent, Labels
    from rsosm_cli.training.metrics import Metric

log = logging.getLogger("rsosm")


def evaluate(
    task: str | TaskSettings,
    city: str | None = None,
    *,
    root: Path | None = None,
    labels: Sequence[Path] = (),
    map: Path | None = None,
    checkpoint: Path | None = None,
    labels_extent: Extent | None = None,
    held_out: bool = True,
    sample: int | None = None,
    seed: int = 0,
    output: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Measure the map of a city (``maps/<task>.tif``), or any ``map``, against ``labels``; or draw a ``sample``.

    Polygons and rasters: confusion of all pixels on labelled ground, with intervals by blocks of ground. Points: taken
    as a stratified random sample of the map, they give area-adjusted overall, user's and producer's accuracy and class
    areas with 95 % intervals (Olofsson et al. 2014). Regression: r2, MAE and RMSE over the polygons, cells or points.

    ``held_out`` leaves out the ground that the map's model was trained on or chosen by, as its checkpoint records (the
    newest run of the task, or ``checkpoint``). ``sample`` writes that many points to interpret, half of them shared
    alike among the classes and half by area, as a GeoPackage with columns to fill in. Results are written beside the
    map, or into ``output``. Raises an error of ours where labels and map do not meet.
    """
    from rsosm_cli.products.reference import MapRaster

    started = time.monotonic()
    space = Workspace.at(root)
    description, run_note = _description(space, task, checkpoint)
    settings = _task(task, description)
    path, own = _map_path(space, settings, city, map)
    raster = MapRaster.open(path, settings, own=own)
    folder = output or path.parent
    notes = [run_note] if run_note else []
    subject = city or path.stem
    work = _Work(raster, settings, folder, path.stem, notes)
    exclude = _training_ground(description, raster, notes) if held_out else None
    if not held_out and description is not None:
        notes.append("Ground that the model was trained on is assessed, too, which flatters the map.")
    if sample is not None:
        result = _sample(work, subject, sample, seed, exclude, force, dry_run)
    elif not labels:
        raise UsageError("No labels are given.", hint="Give --labels FILE, or draw points with --sample 300.")
    else:
        result = _against(work, subject, labels, labels_extent, exclude, dry_run)
    seconds = time.monotonic() - started
    return Result(
        result.command, result.subject, result.status, result.paths, result.numbers, result.notes, seconds=seconds
    )


@dataclass(frozen=True)
class _Work:
    raster: MapRaster
    task: TaskSettings
    folder: Path
    stem: str
    notes: list[str]

    def file(self, ending: str) -> Path:
        return self.folder / f"{self.stem}.{ending}"


def _description(space: Workspace, task: str | TaskSettings, checkpoint: Path | None) -> tuple[Description | None, str]:
    """Return the description of the model behind the map, and how it was found."""
    from rsosm_cli.models.checkpoint import read_description
    from rsosm_cli.training.runs import newest_run

    name = task if isinstance(task, str) else task.name
    if checkpoint is not None:
        return read_description(checkpoint), ""
    try:
        run = newest_run(space.root, kind="finetune", task=name, fits=lambda facts: facts.get("protocol") != "knn")
    except MissingError:
        return None, "No run of this task is known here, so labels on training ground cannot be told from others."
    return read_description(run.folder), f"The training ground is that of {run.name}, the newest run of {name}."


def _task(task: str | TaskSettings, description: Description | None) -> TaskSettings:
    if isinstance(task, TaskSettings):
        return task
    if description is not None and description.task is not None:
        if description.task.name != task:
            raise UsageError(f"The checkpoint is of the task {description.task.name}, not {task}.")
        return description.task
    if task.endswith((".yaml", ".yml")):
        return resolve(TaskSettings, kind="tasks", config=Path(task))
    if task not in preset_names("tasks"):
        raise MissingError(
            f"There is neither a run nor a preset of the task {task}.",
            hint=f"Known presets: {', '.join(preset_names('tasks'))}. Or give the task's YAML, or --checkpoint.",
        )
    return resolve(TaskSettings, kind="tasks", preset=task)


def _map_path(space: Workspace, task: TaskSettings, city: str | None, given: Path | None) -> tuple[Path, bool]:
    """Return the map, and whether rsosm made it, so that its values are class numbers."""
    import rasterio

    if given is None:
        if city is None:
            raise UsageError("Neither a city nor a map is given.", hint="Give --city NAME or --map FILE.")
        path = space.city(city).folder / "maps" / f"{task.name}.tif"
        if not path.exists():
            raise MissingError(
                f"There is no map of {task.name} for {city}.", hint=f'Run `rsosm map {task.name} --city "{city}"`.'
            )
        return path, True
    if not given.exists():
        raise MissingError(f"There is no map {given}.", path=str(given))
    try:
        with rasterio.open(given) as source:
            tags = {key.lower(): value for key, value in source.tags().items()}
    except rasterio.errors.RasterioIOError as error:
        raise RsosmError(f"The map {given} cannot be read: {error}.") from error
    return given, tags.get("rsosm_task") == task.name


def _training_ground(description: Description | None, raster: MapRaster, notes: list[str]) -> Geometry | None:
    from rsosm_cli.training.splits import used_ground

    split = description.provenance.get("split") if description is not None else None
    if not split:
        return None
    ground = used_ground(split["ground"], raster.crs)
    if ground.is_empty:
        return None
    notes.append(f"Ground that the model was trained on or chosen by ({ground.area / 1e6:.2f} km2) is left out.")
    return ground


def _sample(
    work: _Work, subject: str, n_points: int, seed: int, exclude: Geometry | None, force: bool, dry_run: bool
) -> Result:
    import geopandas

    from rsosm_cli.products.accuracy import allocate
    from rsosm_cli.products.reference import class_pixels, draw_points, require_pixels

    raster, task = work.raster, work.task
    if task.kind != "segmentation":
        raise UsageError(f"A sample is drawn by class, and {task.name} predicts values.", hint="Give --labels FILE.")
    path = work.file("sample.gpkg")
    if path.exists() and not force:
        return Result(
            "evaluate", subject, "skipped", {"sample": str(path)}, {},
            (f"{path.name} is there and may have been filled in; --force draws it anew.",),
        )  # fmt: skip
    pixels = class_pixels(raster, exclude)
    require_pixels(int(pixels.sum()), raster, excluded=exclude is not None)
    counts = allocate(n_points, pixels.tolist())
    numbers: dict[str, Any] = {f"points/{c.name}": int(n) for c, n in zip(task.classes, counts, strict=True)}
    if dry_run:
        return Result("evaluate", subject, "planned", {}, numbers, tuple(work.notes))
    xy, stratum = draw_points(raster, counts, seed, exclude)
    frame = geopandas.GeoDataFrame(
        {
            "id": np.arange(1, len(xy) + 1),
            "stratum": stratum,
            task.attribute: np.full(len(xy), None, dtype=object),
            "comment": np.full(len(xy), None, dtype=object),
        },
        geometry=geopandas.points_from_xy(*xy.T),
        crs=raster.crs,
    ).to_crs(WGS84)
    data = io.BytesIO()  # GDAL minds the ending of a temporary name
    frame.to_file(data, driver="GPKG", layer=path.stem)
    with atomic(path) as part:
        part.write_bytes(data.getvalue())
    known = ", ".join(c.name for c in task.classes)
    notes = (
        *work.notes,
        f"Fill in the column `{task.attribute}` with what is there ({known}), then give the file as --labels. "
        "`stratum` is the number of the map's class: do not look at it while interpreting.",
    )
    return Result("evaluate", subject, "done", {"sample": str(path)}, numbers, notes)


def _against(
    work: _Work, subject: str, paths: Sequence[Path], extent: Extent | None, exclude: Geometry | None, dry_run: bool
) -> Result:
    from rsosm_cli.tiles.labels import read_labels

    labels = read_labels(paths, work.task, work.raster.crs, extent=extent)
    work.notes.extend(labels.notes)
    if dry_run:
        west, south, east, north = labels.bounds
        notes = (*work.notes, f"{work.raster.path.name} would be compared with labels of {len(paths)} file(s).")
        return Result("evaluate", subject, "planned", {}, {"labels_km2": (east - west) * (north - south) / 1e6}, notes)
    if work.task.kind == "regression":
        metrics, numbers = _regression(work, labels, exclude)
        assessment, matrix = None, None
    elif labels.only_points:
        assessment, matrix, numbers = _points(work, labels, exclude)
        metrics = []
    else:
        assessment = None
        metrics, matrix, numbers = _pixels(work, labels, exclude)
    for metric in metrics:
        if np.isfinite(metric.value):
            numbers[metric.name] = round(metric.value, 4)
            if "/" not in metric.name and np.isfinite(metric.low):
                numbers[f"{metric.name}_low"] = round(metric.low, 4)
                numbers[f"{metric.name}_high"] = round(metric.high, 4)
    files = _write(work, numbers, metrics, matrix, assessment)
    return Result("evaluate", subject, "done", files, numbers, tuple(work.notes))


def _pixels(work: _Work, labels: Labels, exclude: Geometry | None) -> tuple[list[Metric], np.ndarray, dict[str, Any]]:
    from rsosm_cli.products.reference import compare, require_pixels
    from rsosm_cli.training.metrics import segmentation_metrics

    matrices = compare(work.raster, labels, exclude)
    if exclude is not None and not len(matrices):
        require_pixels(0, work.raster, excluded=len(compare(work.raster, labels, None)) > 0)
    require_pixels(len(matrices), work.raster, excluded=False)
    names = [c.name for c in work.task.classes]
    matrix = matrices.sum(axis=0)
    work.notes.append(
        f"{int(matrix.sum()):,} labelled pixels ({matrix.sum() * work.raster.pixel_m2 / 1e6:.3f} km2) in "
        f"{len(matrices)} blocks of ground were compared."
    )
    return segmentation_metrics(matrices, np.arange(len(matrices)), names), matrix, {"pixels": int(matrix.sum())}


def _points(work: _Work, labels: Labels, exclude: Geometry | None) -> tuple[Assessment, np.ndarray, dict[str, Any]]:
    import shapely

    from rsosm_cli.products.accuracy import assess
    from rsosm_cli.products.reference import class_pixels, classes_at, require_pixels
    from rsosm_cli.tiles.label_files import IGNORE

    raster, k = work.raster, len(work.task.classes)
    geometry, codes = labels.points()
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
    assessment = assess(matrix, areas.tolist(), [c.name for c in work.task.classes])
    work.notes.append(
        "The points are taken as a random sample within each class of the map (Olofsson et al. 2014), as "
        "`rsosm evaluate --sample` draws them; other points give no honest intervals."
    )
    numbers: dict[str, Any] = {"points": int(used.sum())}
    _put(numbers, "overall_accuracy", assessment.overall.value, assessment.overall.margin)
    for i, name in enumerate(assessment.classes):
        _put(numbers, f"users/{name}", assessment.users[i].value, assessment.users[i].margin)
        _put(numbers, f"producers/{name}", assessment.producers[i].value, assessment.producers[i].margin)
        _put(numbers, f"area_m2/{name}", assessment.areas[i].value, assessment.areas[i].margin, digits=0)
        numbers[f"mapped_m2/{name}"] = round(assessment.mapped_areas[i])
        p = assessment.proportions
        both = p[i].sum() + p[:, i].sum()
        if both > 0:
            numbers[f"f1/{name}"] = round(float(2 * p[i, i] / both), 4)
            numbers[f"iou/{name}"] = round(float(p[i, i] / (both - p[i, i])), 4)
    return assessment, matrix, numbers


def _put(numbers: dict[str, Any], name: str, value: float, margin: float, digits: int = 4) -> None:
    if np.isfinite(value):
        numbers[name] = round(value, digits)
    if np.isfinite(margin):
        numbers[f"{name}_margin"] = round(margin, digits)


def _regression(work: _Work, labels: Labels, exclude: Geometry | None) -> tuple[list[Metric], dict[str, Any]]:
    import shapely

    from rsosm_cli.products.reference import BLOCK_M, require_pixels, zone_values
    from rsosm_cli.training.metrics import regression_metrics

    zones, truth = labels.zones()
    if exclude is not None:
        apart = ~shapely.intersects(zones, exclude) | shapely.touches(zones, exclude)
        work.notes.append(f"{int((~apart).sum())} of {len(zones)} labels lie on training ground and are left out.")
        zones, truth = zones[apart], truth[apart]
    total, mean = zone_values(work.raster, zones, exclude)
    predicted = total if work.task.aggregate == "sum" else mean
    known = np.isfinite(predicted) & np.isfinite(truth)
    require_pixels(int(known.sum()), work.raster, excluded=exclude is not None and not len(zones))
    centre = np.floor(shapely.get_coordinates(shapely.centroid(zones[known])) / BLOCK_M).astype(np.int64)
    _, block = np.unique(centre, axis=0, return_inverse=True)
    return regression_metrics(truth[known], predicted[known], block.ravel()), {"zones": int(known.sum())}


def _write(
    work: _Work, numbers: dict[str, Any], metrics: Sequence[Metric], matrix: np.ndarray | None,
    assessment: Assessment | None,
) -> dict[str, str]:  # fmt: skip
    """Write JSON, the error matrix as CSV and a report beside the map; return their paths."""
    from rsosm_cli.training.report import Report

    paths = {"accuracy": work.file("accuracy.json"), "report": work.file("accuracy.html")}
    page = Report(f"{work.task.title or work.task.name}: accuracy of {work.raster.path.name}")
    for note in work.notes:
        page.text(note)
    if metrics:
        page.heading("Metrics, with 95 % intervals by blocks of ground")
        page.table(("metric", "value", "low", "high"), [(m.name, m.value, m.low, m.high) for m in metrics])
    if assessment is not None:
        _assessment_tables(page, assessment)
    if matrix is not None:
        names = [c.name for c in work.task.classes]
        corner = "map" if assessment is not None else "labels"
        page.heading("Error matrix")
        page.text(
            "Sample counts, classes of the map in rows and of the reference in columns."
            if assessment is not None
            else "Pixels, classes of the labels in rows and of the map in columns."
        )
        rows = [(name, *map(int, row), int(row.sum())) for name, row in zip(names, matrix, strict=True)]
        page.table((corner, *names, "total"), rows)
        paths["matrix"] = work.file("accuracy.csv")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([(corner, *names), *(r[:-1] for r in rows)])
        write_text(paths["matrix"], text.getvalue())
    page.write(paths["report"])
    paths["config"] = paths["accuracy"].with_name(f"config.evaluate.{work.task.name}.yaml")
    write_text(paths["config"], dump(work.task))
    write_json(paths["accuracy"], {"map": work.raster.path.name, "numbers": numbers, "notes": work.notes})
    return {name: str(path) for name, path in paths.items()}


def _assessment_tables(page: Any, found: Assessment) -> None:
    page.heading("Area-adjusted accuracy (Olofsson et al. 2014)")
    page.text(f"Overall accuracy {found.overall.value:.3f} ± {found.overall.margin:.3f} (95 %).")
    rows = []
    for i, name in enumerate(found.classes):
        users, producers, area = found.users[i], found.producers[i], found.areas[i]
        rows.append((
            name, f"{users.value:.3f} ± {users.margin:.3f}", f"{producers.value:.3f} ± {producers.margin:.3f}",
            f"{area.value / 1e4:,.1f} ± {area.margin / 1e4:,.1f}", f"{found.mapped_areas[i] / 1e4:,.1f}",
        ))  # fmt: skip
    page.table(("class", "user's accuracy", "producer's accuracy", "area (ha)", "mapped area (ha)"), rows)
