"""What is evaluated: the map (a raster or polygons, ours or another's), its task, and the ground its model has seen."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from rsosm_cli.errors import MissingError, NoFileError, RsosmError, UsageError
from rsosm_cli.presets import preset_names
from rsosm_cli.settings import TaskSettings, resolve
from rsosm_cli.workspace import Workspace

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.models.checkpoint import Description
    from rsosm_cli.products.reference import MapRaster

VECTORS = (".gpkg", ".geojson", ".json", ".parquet", ".shp")


def description_of(
    space: Workspace, task: str | TaskSettings, checkpoint: Path | None, city: str | None, given: Path | None
) -> tuple[Description | None, str]:
    """Return the description of the model behind the map (``given``, or the city's), and how it was found.

    It is the ``checkpoint`` given, or the run that the map names, or where that is gone the newest run of the task.
    """
    from rsosm_cli.models.checkpoint import read_description
    from rsosm_cli.training.runs import newest_run

    name = task if isinstance(task, str) else task.name
    if checkpoint is not None:
        return read_description(checkpoint), ""
    path = _own_map(space, name, city) if given is None and city is not None else given
    made_by = "" if path is None else _tags(path).get("rsosm_checkpoint", "")
    if made_by:
        try:
            found = read_description(space.run(made_by))
        except RsosmError:  # not there any more, or of another rsosm
            found = None
        if found is not None and found.task is not None and found.task.name == name:
            return found, f"The training ground is that of {made_by}, which the map was made with."
    gone = f"The map was made with {made_by}, which is not under {space.root}. " if made_by else ""
    try:
        run = newest_run(space.root, kind="finetune", task=name, fits=lambda facts: facts.get("protocol") != "knn")
    except MissingError:
        unknown = "No run of this task is known here, so labels on training ground cannot be told from others."
        return None, gone + unknown
    return read_description(run.folder), f"{gone}The training ground is that of {run.name}, the newest run of {name}."


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
    """Return the map, and whether its values are class numbers; polygons are drawn as a raster in ``folder``.

    By default that is a folder ``evaluated`` of the city, or of the root: nothing is put beside files of others.
    """
    if given is None:
        if city is None:
            raise UsageError("Neither a city nor a map is given.", hint="Give --city NAME or --map FILE.")
        path = _own_map(space, task.name, city)
        if not path.exists():
            space.require(city)
            raise MissingError(
                f"There is no map of {task.name} for {city}.", hint=f'Run `rsosm map {task.name} --city "{city}"`.'
            )
        return path, True
    if not given.exists():
        raise NoFileError(f"There is no map {given}.", path=str(given))
    if given.suffix.lower() in VECTORS:
        from rsosm_cli.places.place import read_place
        from rsosm_cli.products.drawn_map import draw_map

        files = space.city(city) if city is not None else None
        boundary = read_place(files.place).geometry if files is not None and files.place.exists() else None
        home = folder or (space.root if files is None else files.folder) / "evaluated" / task.name
        path = home / f"{given.stem}.raster.tif"
        draw_map(given, task, boundary, path)
        return path, True
    return given, _tags(given).get("rsosm_task") == task.name


def _own_map(space: Workspace, task: str, city: str) -> Path:
    return space.city(city).maps / f"{task}.tif"


def _tags(path: Path) -> dict[str, str]:
    """Return the tags of a raster, in small letters; none of what is not there or is no raster."""
    import rasterio

    if not path.exists() or path.suffix.lower() in VECTORS:
        return {}
    try:
        with rasterio.open(path) as source:
            return {key.lower(): value for key, value in source.tags().items()}
    except rasterio.errors.RasterioIOError as error:
        raise RsosmError(f"The map {path} cannot be read: {error}.") from error


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
