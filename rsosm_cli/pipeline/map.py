"""``map``: a fine-tuned checkpoint over a whole city, without tiles: windows are cut from imagery and OSM elements."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import FormatError, UsageError
from rsosm_cli.pipeline.inputs import (
    Chosen,
    GroundFiles,
    choose_checkpoint,
    find_ground,
    need_image,
    need_osm,
    opened_image,
    projection_of,
    torch_device,
)
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import MapSettings, TaskSettings, dump
from rsosm_cli.workspace import Manifest, Workspace, file_stamp, fingerprint, locked, require_space, write_text

if TYPE_CHECKING:
    from shapely import Geometry

    from rsosm_cli.geometry import PixelBounds, Projection
    from rsosm_cli.inference.ground import CityWindows
    from rsosm_cli.inference.mapping import Mask
    from rsosm_cli.inference.windows import Strip, WindowPlan
    from rsosm_cli.products.publish import Published

log = logging.getLogger("rsosm")

# Raised when the same inputs and settings would give another map.
VERSION = 1


def map_city(
    task: str,
    city: str | None = None,
    *,
    root: Path | None = None,
    checkpoint: Path | None = None,
    imagery: Path | None = None,
    osm: Path | None = None,
    place: Path | None = None,
    output: Path | None = None,
    settings: MapSettings | None = None,
    device: str = "auto",
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Map ``task`` over ``city`` wall to wall into ``<root>/cities/<slug>/maps/<task>.tif`` (or the folder ``output``).

    The checkpoint is the newest finished run of the task under ``root`` unless ``checkpoint`` says; tile size, GSD,
    bands, normalisation, tag rules and text model are its own. ``imagery``, ``osm`` (an osm.parquet) and ``place`` (a
    vector file) stand in for the city's. Beside the map: polygons, statistics, preview, page, QGIS style, STAC Item.
    Finished strips outlive an interruption.

    Raises :class:`MissingError`, :class:`UsageError`, :class:`FormatError` or :class:`DiskError`.
    """
    started = time.monotonic()
    settings = settings or MapSettings()
    space = Workspace.at(root)
    chosen = choose_checkpoint(space, checkpoint, lambda: _newest(space, task))
    wanted = _task_of(chosen, task)
    ground = find_ground(space, city, imagery=imagery, osm=osm, place=place)
    image_file = need_image(ground, chosen.description) if wanted.modality != "osm" else None
    osm_file = need_osm(ground) if wanted.modality != "image" else None
    own = output is not None or city is None
    folder = output or (space.city(city).maps if city is not None else Path("maps"))
    manifest = Manifest(folder / "manifest.json") if own else space.city(str(city)).manifest
    job = _Job(task, wanted, chosen, ground, image_file, osm_file, folder, manifest, settings)
    step, key = f"map:{task}", job.key()
    if not force and manifest.finished(step, key):
        record = manifest.step(step)
        return Result(
            "map", ground.name, "skipped", _recorded(record, manifest), record.get("numbers", {}),
            tuple(record.get("notes", ())), seconds=time.monotonic() - started,
        )  # fmt: skip
    plan, windows = job.plan()
    numbers: dict[str, Any] = {"windows": sum(windows.values()), "km2": round(job.place_km2(), 4)}
    if dry_run:
        numbers["raster_mb"] = round(job.raw_bytes(plan) / 1e6, 2)
        note = f"{plan.area.width} x {plan.area.height} pixels of {chosen.description.gsd:g} m would be mapped."
        return Result("map", ground.name, "planned", numbers=numbers, notes=(chosen.note, note))
    log.info("%s", chosen.note)
    with locked(folder, f"{task}.lock"):
        published, seconds = _run(job, key, device, offline, force, progress)
    numbers |= _numbers(published.statistics) | {"model_seconds": round(seconds, 2)}
    config = folder / f"config.map.{task}.yaml"
    write_text(config, _config(job))
    paths = {**published.paths, "config": config}
    notes = [chosen.note, *_notes(published.statistics)]
    manifest.record(
        step, key, files=list(paths.values()), seconds=time.monotonic() - started,
        sources=ground.sources(image=image_file is not None, osm=osm_file is not None), numbers=numbers, notes=notes,
        checkpoint=chosen.name, names={name: path.name for name, path in paths.items()},
    )  # fmt: skip
    return Result(
        "map", ground.name, "done", {name: str(path) for name, path in paths.items()}, numbers, tuple(notes),
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _newest(space: Workspace, task: str) -> Path:
    from rsosm_cli.training.runs import newest_run

    # A kNN run leaves no head to map with.
    return newest_run(space.root, kind="finetune", task=task, fits=lambda facts: facts.get("fits") != "none").folder


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


@dataclass(frozen=True)
class _Job:
    """One map, resolved."""

    name: str
    task: TaskSettings
    chosen: Chosen
    ground: GroundFiles
    image_file: Path | None
    osm_file: Path | None
    folder: Path
    manifest: Manifest
    settings: MapSettings

    @property
    def projection(self) -> Projection:
        return projection_of(self.ground, self.chosen.description.gsd)

    @property
    def regression(self) -> bool:
        return self.task.kind == "regression"

    def key(self) -> str:
        files = [p for p in (self.image_file, self.osm_file, self.ground.osm) if p is not None]
        return fingerprint(
            "map", VERSION, self.settings.model_dump(exclude={"batch_size"}), self.chosen.stamps(),
            [file_stamp(p) for p in files], self.ground.place_stamp,
        )  # fmt: skip

    def local_place(self) -> Geometry:
        from rsosm_cli.products.publish import local

        return local(self.ground.place, self.projection.crs)

    def place_km2(self) -> float:
        from rsosm_cli.places.place import area_km2

        return area_km2(self.ground.place)

    def plan(self, cell_px: int = 1) -> tuple[WindowPlan, dict[str, int]]:
        """Return the windows, and how many each strip is expected to need."""
        from rsosm_cli.inference.windows import WindowPlan

        d = self.chosen.description
        plan = WindowPlan.of(
            self.projection.pixels_around(*self.local_place().bounds), tile_px=d.tile, overlap=self.settings.overlap,
            cell_px=cell_px, whole_steps=self.regression,
        )  # fmt: skip
        return plan, _expected(plan, self.windows(plan))

    def windows(self, plan: WindowPlan) -> CityWindows:
        """Return the windows without anything to read: enough to count them."""
        from rsosm_cli.inference.ground import CityWindows, Ground

        d = self.chosen.description
        bare = Ground(self.projection, d.tile, None, None, d.graph, None)
        return CityWindows(plan, bare, self.local_place(), self.settings.batch_size)

    def raw_bytes(self, plan: WindowPlan) -> float:
        """Return the uncompressed size of the rasters that are written."""
        if self.regression:
            return 4 * plan.area.width * plan.area.height / plan.cell_px**2
        layers = 1 + self.settings.uncertainty + self.settings.probability * len(self.task.classes)
        return layers * plan.area.width * plan.area.height


def _expected(plan: WindowPlan, windows: CityWindows) -> dict[str, int]:
    counts: dict[str, int] = {}
    above: Strip | None = None
    for strip in plan.strips():
        rows = plan.rows_of(strip)
        if above is not None and above.block == strip.block:
            rows = range(max(rows.start, plan.rows_of(above).stop), rows.stop)
        counts[strip.name] = sum(len(windows.meeting(row, plan.columns_of(strip))) for row in rows)
        above = strip
    return counts


def _run(job: _Job, key: str, device: str, offline: bool, force: bool, progress: Progress) -> tuple[Published, float]:
    """Map all strips that are not there yet, publish, and remove the strips; return what was published and how long
    the mapping took.
    """
    from rsosm_cli.inference.ground import CityWindows, ElementBand, Ground
    from rsosm_cli.inference.mapping import Layers, map_area
    from rsosm_cli.inference.predict import Predictor
    from rsosm_cli.inference.tags import TagTable
    from rsosm_cli.models.checkpoint import load_checkpoint
    from rsosm_cli.models.heads import TaskModel
    from rsosm_cli.products.parts import MapParts
    from rsosm_cli.products.publish import MapFacts, layers_of, publish

    s, d = job.settings, job.chosen.description
    where = torch_device(device)
    model = load_checkpoint(job.chosen.folder).model
    assert isinstance(model, TaskModel)
    predictor = Predictor(
        model, d, where, precision=s.precision, tta=s.tta, cell_px=job.plan()[0].cell_px if job.regression else None
    )
    plan, windows = job.plan(predictor.cell_px)
    place = job.local_place()
    layers = layers_of(job.task, plan.cell_px, probability=s.probability, uncertainty=s.uncertainty)
    parts = MapParts(_parts_folder(job, key, force), plan, job.projection, layers)
    # Strips, the copy made of them and its overviews: a fifth of the raw size each is more than maps compress to.
    require_space(job.folder, 0.6 * job.raw_bytes(plan) + 50e6, f"The map {job.name}")
    started = time.monotonic()
    with opened_image(job.image_file, d.bands) as image:
        elements = ElementBand(job.osm_file, job.projection.crs) if job.osm_file is not None else None
        tags = TagTable(d, where, offline=offline) if elements is not None else None
        source = CityWindows(plan, Ground(job.projection, d.tile, image, elements, d.graph, tags), place, s.batch_size)
        with progress.task(f"map {job.name}: {job.ground.name}", sum(windows.values()), "windows") as advance:
            meter = _Meter(windows, advance)
            drawn = Layers(job.task.kind, s.probability, s.uncertainty, amounts=job.task.aggregate == "sum")
            map_area(
                plan, source, predictor, parts, channels=predictor.channels,
                layers=drawn, mask=_mask(job.projection, place),
                device=where, on_batch=meter.batch, on_strip=meter.strip,
            )  # fmt: skip
    seconds = time.monotonic() - started
    facts = MapFacts(
        job.task, job.ground.name, job.chosen.name, job.ground.place, place,
        job.ground.sources(image=job.ground.imagery is not None, osm=job.ground.osm is not None), job.ground.when(),
        s.min_area_m2, s.simplify_px,
    )  # fmt: skip
    with (
        opened_image(job.ground.imagery, _shown_bands(job)) as picture,
        progress.task(f"map {job.name}: {job.ground.name}, files", 1, "steps") as advance,
    ):
        published = publish(job.folder, parts, facts, image=picture, read=_read_elements(job))
        advance(1)
    shutil.rmtree(parts.folder.parent, ignore_errors=True)
    return published, seconds


def _parts_folder(job: _Job, key: str, force: bool) -> Path:
    """Return the folder of the strips of this very map; those of other settings or inputs are removed."""
    whole = job.folder / f".{job.name}.parts"
    mine = whole / key
    for other in whole.glob("*") if whole.exists() else ():
        if other != mine or force:
            shutil.rmtree(other, ignore_errors=True)
    mine.mkdir(parents=True, exist_ok=True)
    return mine


def _shown_bands(job: _Job) -> tuple[int, ...]:
    """Return the bands to draw: those of the checkpoint, or the first three, as far as the imagery has them."""
    if job.ground.imagery is None:
        return (1,)
    from rsosm_cli.imagery.reader import ImageReader

    with ImageReader(job.ground.imagery, (1,)) as reader:
        count = reader.count
    bands = job.chosen.description.bands if max(job.chosen.description.bands) <= count else (1, 2, 3)
    return bands if max(bands) <= count else (1,)


def _read_elements(job: _Job) -> Any:
    if job.ground.osm is None:
        return None
    from functools import partial

    from rsosm_cli.osm.elements import read_elements

    return partial(read_elements, job.ground.osm, job.projection.crs)


def _mask(projection: Projection, place: Geometry) -> Mask:
    """Return what tells the pixels of a strip that belong to the place: those whose centre lies in it."""
    import numpy as np
    import shapely

    from rsosm_cli.products.builtup import rasterised

    def mask(box: PixelBounds) -> Any:
        clipped = shapely.clip_by_rect(place, *projection.bounds_of(box.padded(1)))
        if clipped.is_empty:
            return np.zeros((box.height, box.width), bool)
        return rasterised(np.array([clipped], dtype=object), (box.height, box.width), projection.transform_of(box))

    return mask


class _Meter:
    """Tells the progress in windows, also of strips that were finished before or that have nothing to map."""

    def __init__(self, windows: Mapping[str, int], advance: Any) -> None:
        self._windows, self._advance, self._told = windows, advance, 0

    def batch(self, windows: int) -> None:
        self._told += windows
        self._advance(windows)

    def strip(self, strip: Strip) -> None:
        self._advance(max(0, self._windows.get(strip.name, 0) - self._told))
        self._told = 0


def _config(job: _Job) -> str:
    import yaml

    head = {
        "task": job.name,
        "checkpoint": str(job.chosen.folder),
        "imagery": None if job.image_file is None else str(job.image_file),
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
