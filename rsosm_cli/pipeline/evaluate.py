"""``evaluate``: a finished map against reference labels, and the points to interpret for an accuracy assessment."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import UsageError
from rsosm_cli.geometry import WGS84
from rsosm_cli.pipeline.evaluate_classes import Found, Work, against_pixels, against_points
from rsosm_cli.pipeline.evaluate_inputs import VECTORS, description_of, map_of, task_of, training_ground
from rsosm_cli.pipeline.evaluate_report import write_evaluation
from rsosm_cli.pipeline.label_origin import warn_of_copies
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import TaskSettings
from rsosm_cli.workspace import Workspace, atomic, write_json

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.tiles.labels import Extent, Labels


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

    Overall, user's and producer's accuracy and class areas are adjusted for the areas mapped, with 95 % intervals
    (Olofsson et al. 2014): of points, taken as a stratified random sample of the map; of polygons and rasters, from all
    pixels on labelled ground, with intervals by blocks of ground, and with IoU and F1 besides. Regression: r2, MAE and
    RMSE over the polygons, cells or points; distribution: L1, KL and cosine over labels with shares.

    ``map`` may be polygons or a raster made elsewhere; without labels and ``sample`` it is summarised: areas, shares,
    and the city's built-up land and buildings by class.

    ``held_out`` leaves out the ground that the map's model was trained on or chosen by, as its checkpoint records
    (``checkpoint``, or the run that the map names, or where that is gone the newest of the task). ``sample`` writes
    that many points to interpret, half of them shared alike among the classes and half by area, as a GeoPackage with
    columns to fill in. Results are written beside the map, those of polygons into a folder ``evaluated`` under the
    root; or into ``output``. Raises an error of ours where labels and map do not meet.
    """
    from rsosm_cli.products.reference import MapRaster

    started = time.monotonic()
    space = Workspace.at(root)
    description, run_note = description_of(space, task, checkpoint, city, map)
    settings = task_of(task, description)
    if dry_run and map is not None and map.suffix.lower() in VECTORS and map.exists():
        note = f"{map.name} would be drawn as a raster, and that be measured."
        return Result("evaluate", city or map.stem, "planned", notes=(run_note, note) if run_note else (note,))
    path, own = map_of(space, settings, city, map, output)
    raster = MapRaster.open(path, settings, own=own)
    folder = output or path.parent
    notes = [run_note] if run_note else []
    stem = path.stem.removesuffix(".raster")
    subject = city or stem
    labels = list(labels) or _filled_in(folder / f"{stem}.sample.gpkg", sample, map)
    work = Work(raster, settings, folder, stem, notes, "" if held_out else "-all-ground")
    exclude = training_ground(description, raster, notes) if held_out else None
    if not held_out and description is not None:
        notes.append("Ground that the model was trained on is assessed, too, which flatters the map.")
    if sample is not None:
        result = _sample(work, subject, sample, seed, exclude, force, dry_run)
    elif not labels and map is not None:
        result = _summary(work, subject, space, city, dry_run)
    elif not labels:
        raise UsageError(
            "There is nothing to evaluate against.",
            hint="Give --labels FILE, or draw points to interpret with --sample 300.",
        )
    else:
        read_osm = description is not None and description.task is not None and description.task.modality != "image"
        osm = space.city(city).osm if read_osm and city is not None else None
        result = _against(work, subject, labels, labels_extent, exclude, osm, dry_run)
    seconds = time.monotonic() - started
    return Result(
        result.command, result.subject, result.status, result.paths, result.numbers, result.notes, seconds=seconds
    )


def _sample(
    work: Work, subject: str, n_points: int, seed: int, exclude: Geometry | None, force: bool, dry_run: bool
) -> Result:
    import geopandas

    from rsosm_cli.products.accuracy import allocate
    from rsosm_cli.products.reference import class_pixels, draw_points, require_pixels

    raster, task = work.raster, work.task
    if task.kind == "regression":
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
    work: Work, subject: str, paths: Sequence[Path], extent: Extent | None, exclude: Geometry | None,
    osm: Path | None, dry_run: bool,
) -> Result:  # fmt: skip
    from rsosm_cli.tiles.labels import read_labels

    labels = read_labels(paths, work.task, work.raster.crs, extent=extent)
    work.notes.extend(labels.notes)
    if osm is not None:
        work.notes.extend(warn_of_copies(paths, [osm]))
    if dry_run:
        west, south, east, north = labels.bounds
        notes = (*work.notes, f"{work.raster.path.name} would be compared with labels of {len(paths)} file(s).")
        return Result("evaluate", subject, "planned", {}, {"labels_km2": (east - west) * (north - south) / 1e6}, notes)
    if work.task.kind == "regression":
        found = _regression(work, labels, exclude)
    elif labels.has_shares:
        found = _shares(work, labels, exclude)
    elif labels.only_points:
        work = replace(work, suffix=f"-points{work.suffix}")
        found = against_points(work, labels, exclude)
    else:
        found = against_pixels(work, labels, exclude)
    numbers = found.numbers
    for metric in found.metrics:
        if np.isfinite(metric.value):
            numbers[metric.name] = round(metric.value, 4)
            if "/" not in metric.name and np.isfinite(metric.low):
                numbers[f"{metric.name}_low"] = round(metric.low, 4)
                numbers[f"{metric.name}_high"] = round(metric.high, 4)
    title = f"{work.task.title or work.task.name}: accuracy of {work.raster.path.name}"
    files = write_evaluation(work, found, title)
    return Result("evaluate", subject, "done", files, numbers, tuple(work.notes))


def _regression(work: Work, labels: Labels, exclude: Geometry | None) -> Found:
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
    metrics = regression_metrics(truth[known], predicted[known], block.ravel())
    return Found({"zones": int(known.sum())}, metrics)


def _shares(work: Work, labels: Labels, exclude: Geometry | None) -> Found:
    """Compare the mean shares of the map's cells in each label's polygon with the shares that it has."""
    import shapely

    from rsosm_cli.products.reference import BLOCK_M, MapRaster, require_pixels, zone_values
    from rsosm_cli.tiles.label_files import VectorLayer
    from rsosm_cli.training.metrics import distribution_metrics

    layers = [layer for layer in labels.layers if isinstance(layer, VectorLayer) and layer.shares is not None]
    zones = np.concatenate([layer.geometry for layer in layers])
    truth = np.concatenate([layer.shares for layer in layers if layer.shares is not None])
    path = work.raster.path.with_name(f"{work.raster.path.stem}.shares.tif")
    bands = [MapRaster.open(path, work.task, own=True, band=k + 1) for k in range(len(work.names))]
    predicted = np.stack([zone_values(band, zones, exclude)[1] for band in bands], axis=1)
    known = np.isfinite(predicted).all(axis=1) & (np.nan_to_num(predicted).sum(axis=1) > 0)
    require_pixels(int(known.sum()), work.raster, excluded=exclude is not None)
    predicted = predicted[known] / predicted[known].sum(axis=1, keepdims=True)
    centre = np.floor(shapely.get_coordinates(shapely.centroid(zones[known])) / BLOCK_M).astype(np.int64)
    _, block = np.unique(centre, axis=0, return_inverse=True)
    metrics = distribution_metrics(truth[known], predicted, block.ravel(), work.names)
    return Found({"zones": int(known.sum())}, metrics)


def _filled_in(path: Path, sample: int | None, given: Path | None) -> list[Path]:
    """Return the city's own sample of points where nothing else is named and it is there."""
    return [path] if sample is None and given is None and path.exists() else []


def _summary(work: Work, subject: str, space: Workspace, city: str | None, dry_run: bool) -> Result:
    """Write the statistics of a map made elsewhere; with a city, its buildings and built-up land by class."""
    from functools import partial

    from rsosm_cli.osm.elements import read_elements
    from rsosm_cli.products.builtup import read_buildings
    from rsosm_cli.products.statistics import class_statistics, value_statistics

    raster, task = work.raster, work.task
    if dry_run:
        return Result("evaluate", subject, "planned", {}, {}, (f"{raster.path.name} would be summarised.",))
    shown: dict[str, Any]
    if task.kind == "regression":
        numbers = value_statistics(raster.path)
        shown = {k: numbers[k] for k in ("total", "mean", "median", "maximum") if k in numbers}
    else:
        classes = raster.as_classes(work.file("classes.tif"))
        osm = space.city(city).osm if city is not None else None
        read = partial(read_elements, osm, raster.crs) if osm is not None and osm.exists() else None
        buildings = read_buildings(read, raster.bounds) if read is not None else None
        numbers = class_statistics(classes, work.names, read=read, buildings=buildings)
        shown = {f"{row['name']}_km2": round(row["area_m2"] / 1e6, 4) for row in numbers["classes"]}
        shown |= {f"{row['name']}_share": row["share"] for row in numbers["classes"] if row["share"] is not None}
    path = work.file("stats.json")
    if path.exists() and work.raster.path.parent == work.folder and work.raster.own:
        path = work.file("summary.json")  # a map of ours has its statistics
    write_json(path, {"map": raster.path.name, "task": task.name, **numbers})
    shown["mapped_km2"] = round(numbers["mapped_m2"] / 1e6, 4)
    return Result("evaluate", subject, "done", {"statistics": str(path)}, shown, tuple(work.notes))
