"""What is evaluated: the map (a raster or polygons, ours or another's), its task, and the ground its model has seen."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsosm_cli.errors import MissingError, NoFileError, RsosmError, UsageError
from rsosm_cli.presets import preset_names
from rsosm_cli.settings import TaskSettings, resolve
from rsosm_cli.workspace import Workspace

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.models.checkpoint import Description
    from rsosm_cli.products.reference import MapRaster

VECTORS = (".gpkg", ".geojson", ".json", ".parquet", ".shp")
# Longer side of the raster that polygons are drawn on, in pixels of at least a metre: bounds its memory.
LONGEST_PX = 20_000


def description_of(
    space: Workspace, task: str | TaskSettings, checkpoint: Path | None
) -> tuple[Description | None, str]:
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


def task_of(task: str | TaskSettings, description: Description | None) -> TaskSettings:
    if isinstance(task, TaskSettings):
        return task
    if description is not None and description.task is not None:
        if description.task.name != task:
            raise UsageError(f"The checkpoint is of the task {description.task.name}, not {task}.")
        return description.task
    if task.endswith((".yaml", ".yml")):
        return resolve(TaskSettings, kind="tasks", config=Path(task))
    if task not in preset_names("tasks"):
        close = difflib.get_close_matches(task, preset_names("tasks"), n=1)
        known = f"Did you mean {close[0]}?" if close else f"Known presets: {', '.join(preset_names('tasks'))}."
        raise MissingError(
            f"There is neither a run nor a preset of the task {task}.",
            hint=f"{known} Or give the task's YAML, or --checkpoint.",
        )
    return resolve(TaskSettings, kind="tasks", preset=task)


def map_of(
    space: Workspace, task: TaskSettings, city: str | None, given: Path | None, folder: Path | None
) -> tuple[Path, bool]:
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
        raise NoFileError(f"There is no map {given}.", path=str(given))
    if given.suffix.lower() in VECTORS:
        return rasterised_map(space, task, city, given, folder), True
    try:
        with rasterio.open(given) as source:
            tags = {key.lower(): value for key, value in source.tags().items()}
    except rasterio.errors.RasterioIOError as error:
        raise RsosmError(f"The map {given} cannot be read: {error}.") from error
    return given, tags.get("rsosm_task") == task.name


def training_ground(description: Description | None, raster: MapRaster, notes: list[str]) -> Geometry | None:
    from rsosm_cli.training.splits import used_ground

    split = description.provenance.get("split") if description is not None else None
    if not split:
        return None
    ground = used_ground(split["ground"], raster.crs)
    if ground.is_empty:
        return None
    notes.append(f"Ground that the model was trained on or chosen by ({ground.area / 1e6:.2f} km2) is left out.")
    return ground


def rasterised_map(space: Workspace, task: TaskSettings, city: str | None, given: Path, folder: Path | None) -> Path:
    """Write polygons made elsewhere as a class raster, in ``folder`` or beside them; return its path.

    Ground that they leave is the task's background within the city's boundary, or else within their box.
    """
    import rasterio
    import shapely
    from rasterio.features import rasterize

    from rsosm_cli.geometry import WGS84, Projection, reproject, utm_crs
    from rsosm_cli.places.place import read_place
    from rsosm_cli.tiles.label_files import IGNORE, read_frame, read_vector
    from rsosm_cli.workspace import atomic

    frame = read_frame(given)
    lonlat = reproject(np.asarray(frame.geometry, dtype=object), frame.crs.to_string(), WGS84)
    place = space.city(city).place if city is not None else None
    around = (
        read_place(place).geometry
        if place is not None and place.exists()
        else shapely.box(*shapely.total_bounds(lonlat))
    )
    crs = utm_crs(around)
    ground = reproject(np.array([around], dtype=object), WGS84, crs)[0]
    layer = read_vector(given, task, crs, ground, [])
    west, south, east, north = shapely.bounds(ground)
    gsd = max(1.0, max(east - west, north - south) / LONGEST_PX)
    projection = Projection(crs, float(np.ceil(gsd)))
    box = projection.pixels_around(west, south, east, north)
    transform = projection.transform_of(box)
    values = np.full((box.height, box.width), IGNORE, np.uint8)
    if task.background is not None:
        index = [c.name for c in task.classes].index(task.background)
        rasterize([(ground, index)], out=values, transform=transform)
    inside = shapely.intersects(layer.geometry, ground)
    if inside.any():
        shapes = zip(layer.geometry[inside], layer.codes[inside].astype(int).tolist(), strict=True)
        rasterize(shapes, out=values, transform=transform)
    path = (folder or given.parent) / f"{given.stem}.raster.tif"
    with atomic(path) as part, rasterio.open(
        part, "w", driver="GTiff", width=box.width, height=box.height, count=1, dtype="uint8", crs=crs,
        transform=transform, nodata=IGNORE, compress="deflate", tiled=True,
    ) as target:  # fmt: skip
        target.write(values, 1)
        target.update_tags(RSOSM_TASK=task.name)
    return path
