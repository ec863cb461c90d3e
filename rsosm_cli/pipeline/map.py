"""``map``: a fine-tuned checkpoint over a whole city, without tiles: windows are cut from imagery and OSM elements."""

from __future__ import annotations

import difflib
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.memory import give_back
from rsosm_cli.pipeline.inputs import (
    Chosen,
    GroundFiles,
    choose_checkpoint,
    find_ground,
    need_image,
    need_osm,
    opened_image,
    torch_device,
)
from rsosm_cli.pipeline.map_job import MapJob, Strips, map_strips, map_strips_of_rank
from rsosm_cli.pipeline.map_refine import require_refinement, sharpen
from rsosm_cli.pipeline.result import Result
from rsosm_cli.presets import preset_names
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import MapSettings, TaskSettings, dump
from rsosm_cli.workspace import CityFiles, Manifest, Workspace, locked, require_space, write_text

if TYPE_CHECKING:
    from rsosm_cli.products.publish import Published
    from rsosm_cli.training.devices import Devices

log = logging.getLogger("rsosm")


def map_city(
    task: str,
    city: str | None = None,
    *,
    root: Path | None = None,
    checkpoint: Path | None = None,
    imagery: Path | None = None,
    osm: Path | None = None,
    place: Path | None = None,
    epochs: tuple[str, str] | None = None,
    output: Path | None = None,
    settings: MapSettings | None = None,
    gpus: int | None = None,
    nodes: int = 1,
    device: str = "auto",
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Map ``task`` over ``city`` wall to wall into ``<root>/cities/<slug>/maps/<task>.tif`` (or the folder ``output``).

    The checkpoint is the newest finished run of the task under ``root`` unless ``checkpoint`` says; tile size, GSD,
    bands, normalisation, tag rules and text model are its own. ``imagery``, ``osm`` (an osm.parquet) and ``place`` (a
    vector file) stand in for the city's. ``epochs``: the two dates of a change task, each the epoch that `fetch` kept
    as ``imagery-<epoch>.tif``, or a raster; the later may be empty for the city's ``imagery.tif``. Beside the map:
    polygons, statistics, preview, page, QGIS style, STAC Item. Finished strips outlive an interruption; with ``gpus``
    they are shared out among as many processes.

    Raises :class:`MissingError`, :class:`UsageError`, :class:`FormatError` or :class:`DiskError`.
    """
    from rsosm_cli.training.devices import choose, process_rank

    started = time.monotonic()
    settings = settings or MapSettings()
    space = Workspace.at(root)
    devices = choose(gpus=gpus, nodes=nodes, device=device)
    chosen = choose_checkpoint(space, checkpoint, lambda: newest_head(space, task))
    wanted = _task_of(chosen, task)
    ground = find_ground(space, city, imagery=imagery, osm=osm, place=place)
    images = _images(space, city, ground, chosen, wanted, epochs)
    osm_file = need_osm(ground) if wanted.modality != "image" else None
    own = output is not None or city is None
    folder = output or (space.city(city).maps if city is not None else Path("maps"))
    manifest = Manifest(folder / "manifest.json") if own else space.city(str(city)).manifest
    job = MapJob(task, wanted, chosen, ground, images, osm_file, folder, manifest, settings, offline)
    step, key = f"map:{task}", job.key()

    def finished() -> Result:
        record = manifest.step(step)
        return Result(
            "map", ground.name, "skipped", _recorded(record, manifest), record.get("numbers", {}),
            tuple(record.get("notes", ())), seconds=time.monotonic() - started,
        )  # fmt: skip

    if not force and manifest.finished(step, key):
        return finished()
    if settings.refine != "none":
        require_refinement(job, dry_run)
    plan, windows = job.plan()
    numbers: dict[str, Any] = {"windows": sum(windows.values()), "km2": round(job.place_km2(), 4)}
    if dry_run:
        numbers["raster_mb"] = round(job.raw_bytes(plan) / 1e6, 2)
        note = f"{plan.area.width} x {plan.area.height} pixels of {chosen.description.gsd:g} m would be mapped."
        return Result("map", ground.name, "planned", numbers=numbers, notes=(chosen.note, note))
    if process_rank() > 0:  # started by torchrun or SLURM: rank 0 does everything but the strips
        _map(job, devices, SILENT)
        return Result("map", ground.name, "done", numbers=numbers)
    log.info("%s", chosen.note)
    with locked(folder, f"{task}.lock"):
        if not force and devices.launcher in ("none", "spawn") and manifest.finished(step, key):
            return finished()  # another process mapped it while this one waited
        _prepare(job, key, force)
        strips = _map(job, devices, progress)
        published = _publish(job, strips.cell_px, devices.accelerator, progress)
    numbers |= _numbers(published.statistics) | {"model_seconds": round(strips.seconds, 2)}
    config = folder / f"config.map.{task}.yaml"
    write_text(config, _config(job))
    paths = {**published.paths, "config": config}
    notes = [chosen.note, *published.notes, *_notes(published.statistics)]
    manifest.record(
        step, key, files=list(paths.values()), seconds=time.monotonic() - started,
        sources=ground.sources(image=bool(images), osm=osm_file is not None), numbers=numbers, notes=notes,
        checkpoint=chosen.name, names={name: path.name for name, path in paths.items()},
    )  # fmt: skip
    return Result(
        "map", ground.name, "done", {name: str(path) for name, path in paths.items()}, numbers, tuple(notes),
        seconds=time.monotonic() - started,
    )  # fmt: skip


def newest_head(space: Workspace, task: str) -> Path:
    """Return the newest run of a task that left a head to map with."""
    from rsosm_cli.training.runs import all_runs, newest_run

    try:
        # A kNN run leaves no head to map with.
        return newest_run(space.root, kind="finetune", task=task, fits=lambda facts: facts.get("fits") != "none").folder
    except MissingError:
        known = {*preset_names("tasks"), *(str(facts["task"]) for _, facts in all_runs(space.root) if "task" in facts)}
        if task in known:
            raise
        close = difflib.get_close_matches(task, sorted(known), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(known))}."
        raise UsageError(
            f"There is no task {task!r}: neither a run under {space.root} nor a preset has that name.", hint=hint
        ) from None


def _task_of(chosen: Chosen, task: str) -> TaskSettings:
    found = chosen.description.task
    if found is None:
        raise FormatError(
            f"{chosen.folder} is a pretraining checkpoint: it has no head to map {task} with.",
            hint=f"Run `rsosm finetune {task} --checkpoint {chosen.folder}` first.",
        )
    if found.name != task:
        raise UsageError(
            f"{chosen.folder} was trained for the task {found.name}, not {task}.",
            hint=f"Run `rsosm map {found.name}`, or give another --checkpoint.",
        )
    return found


def _images(
    space: Workspace, city: str | None, ground: GroundFiles, chosen: Chosen, task: TaskSettings,
    epochs: tuple[str, str] | None,
) -> tuple[Path, ...]:  # fmt: skip
    """Return the imagery that the model looks at: none, the ground's, or that of two dates."""
    if task.kind != "change":
        if epochs is not None:
            raise UsageError(
                f"The task {task.name} looks at one image, not at two dates.", hint="Leave out --from and --to."
            )
        return (need_image(ground, chosen.description),) if task.modality != "osm" else ()
    if epochs is None:
        raise UsageError(
            f"The task {task.name} compares two dates.", hint="Name them: --from 2019 --to 2023 (or two rasters)."
        )
    files = None if city is None else space.city(city)
    return epoch_image(files, epochs[0], ground.imagery), epoch_image(files, epochs[1], ground.imagery)


def epoch_image(files: CityFiles | None, epoch: str, imagery: Path | None) -> Path:
    """Return the raster of an epoch: a file, the city's image of that epoch, or its imagery for an empty one."""
    if epoch and Path(epoch).is_file():
        return Path(epoch)
    path = imagery if not epoch else None if files is None else files.imagery_of(epoch)
    if path is not None and path.exists():
        return path
    there = files.epochs() if files is not None else []
    hint = f"There are {', '.join(there)}." if there else "Fetch it: rsosm fetch --city NAME --epoch 2019 --imagery ..."
    raise MissingError(f"There is no imagery of the epoch {epoch or 'today'!r}.", hint=hint)


def _prepare(job: MapJob, key: str, force: bool) -> None:
    """Remove the strips of other settings or inputs, and see that there is room for this map's."""
    whole = job.folder / f".{job.name}.parts"
    mine = whole / key
    for other in whole.glob("*") if whole.exists() else ():
        if other != mine or force:
            shutil.rmtree(other, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    # Strips, the copy made of them and its overviews: a fifth of the raw size each is more than maps compress to.
    require_space(job.folder, 0.6 * job.raw_bytes(job.plan()[0]) + 50e6, f"The map {job.name}")


def _map(job: MapJob, devices: Devices, progress: Progress) -> Strips:
    """Map the strips that are missing."""
    from rsosm_cli.training import devices as machines

    if devices.launcher == "none":
        return map_strips(job, torch_device(devices.accelerator), progress)
    found: Strips = machines.run(devices, "32", map_strips_of_rank, job, progress=progress)
    return found


def _publish(job: MapJob, cell_px: int, device: str, progress: Progress) -> Published:
    from rsosm_cli.products.publish import MapFacts, publish
    from rsosm_cli.tiles.rooms import release

    release()
    give_back()  # what the windows took, before the pictures take theirs
    s = job.settings
    parts = job.parts(job.plan(cell_px)[0])
    facts = MapFacts(
        job.task, job.ground.name, job.chosen.name, job.ground.place, job.local_place(),
        job.ground.sources(image=job.ground.imagery is not None, osm=job.ground.osm is not None), job.ground.when(),
        s.min_area_m2, s.simplify_px, job.ground.admin_level,
    )  # fmt: skip
    shown = job.images[-1] if len(job.images) == 2 else job.ground.imagery
    # A look at the whole, once, and patches for the segmenter: neither comes back to a place often.
    with opened_image(shown, _shown_bands(job, shown), (2048, 2048)) as picture:
        refined: Path | None = None
        notes: tuple[str, ...] = ()
        if s.refine != "none" and picture is not None:
            refined, note = sharpen(job, parts, picture, device, progress)
            notes = (note,)
        with progress.task(f"map {job.name}: {job.ground.name}, writing its files", 1) as advance:
            published = publish(
                job.folder, parts, facts, image=picture, read=_read_elements(job), refined=refined, notes=notes
            )
            advance(1)
    shutil.rmtree(parts.folder.parent, ignore_errors=True)
    return published


def _shown_bands(job: MapJob, imagery: Path | None) -> tuple[int, ...]:
    """Return the bands to draw: those of the checkpoint, or the first three, as far as the imagery has them."""
    if imagery is None:
        return (1,)
    from rsosm_cli.imagery.reader import ImageReader

    with ImageReader(imagery, (1,)) as reader:
        count = reader.count
    bands = job.chosen.description.bands if max(job.chosen.description.bands) <= count else (1, 2, 3)
    return bands if max(bands) <= count else (1,)


def _read_elements(job: MapJob) -> Any:
    if job.ground.osm is None:
        return None
    from functools import partial

    from rsosm_cli.osm.elements import read_elements

    return partial(read_elements, job.ground.osm, job.projection.crs)


def _config(job: MapJob) -> str:
    import yaml

    head = {
        "task": job.name,
        "checkpoint": str(job.chosen.folder),
        "imagery": [str(path) for path in job.images],
        "osm": None if job.osm_file is None else str(job.osm_file),
    }
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "settings:\n" + _indented(dump(job.settings))


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _recorded(record: Mapping[str, Any], manifest: Manifest) -> dict[str, str]:
    """Return the paths that a finished step recorded, by name."""
    by_file = {Path(file).name: str(manifest.path.parent / file) for file in record.get("files", {})}
    return {name: by_file[file] for name, file in record.get("names", {}).items() if file in by_file}


def _numbers(statistics: Mapping[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"mapped_km2": round(statistics["mapped_m2"] / 1e6, 4)}
    for row in statistics.get("classes", ()):
        numbers[f"{row['name']}_km2"] = round(row["area_m2"] / 1e6, 4)
    for key in ("total", "per_km2"):
        if key in statistics:
            numbers[key] = round(statistics[key], 3)
    return numbers


def _notes(statistics: Mapping[str, Any]) -> list[str]:
    if statistics["mapped_m2"] == 0:
        return ["Nothing is mapped: no window has an image inside of the place."]
    return []
