"""One map, resolved: what is mapped, with which checkpoint, from which files; and the mapping of its strips.

A job is picklable, so that the processes of several devices can each take their share of the strips.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsosm_cli.pipeline.inputs import Chosen, GroundFiles, opened_image, projection_of
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import MapSettings, TaskSettings
from rsosm_cli.workspace import Manifest, file_stamp, fingerprint

if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric
    from shapely import Geometry

    from rsosm_cli.geometry import PixelBounds, Projection
    from rsosm_cli.inference.ground import CityWindows
    from rsosm_cli.inference.mapping import Mask
    from rsosm_cli.inference.windows import Strip, WindowPlan
    from rsosm_cli.products.parts import MapParts

# Raised when the same inputs and settings would give another map.
VERSION = 1


@dataclass(frozen=True)
class MapJob:
    """One map, resolved. ``images``: the imagery that the model looks at, one file a date; or none."""

    name: str
    task: TaskSettings
    chosen: Chosen
    ground: GroundFiles
    images: tuple[Path, ...]
    osm_file: Path | None
    folder: Path
    manifest: Manifest
    settings: MapSettings
    offline: bool = False

    @property
    def projection(self) -> Projection:
        return projection_of(self.ground, self.chosen.description.gsd)

    @property
    def by_tile(self) -> bool:
        """Whether a window has one answer, so that a cell of the map is a step of the windows."""
        return not self.task.dense

    def key(self) -> str:
        files = [p for p in (*self.images, self.osm_file, self.ground.osm) if p is not None]
        return fingerprint(
            "map", VERSION, self.settings.model_dump(exclude={"batch_size"}), self.chosen.stamps(),
            [file_stamp(p) for p in files], self.ground.place_stamp,
        )  # fmt: skip

    def local_place(self) -> Geometry:
        from rsosm_cli.products.publish import local

        return local(self.ground.place, self.projection.crs)

    def place_km2(self) -> float:
        from rsosm_cli.geometry import area_km2

        return area_km2(self.ground.place)

    def plan(self, cell_px: int = 1) -> tuple[WindowPlan, dict[str, int]]:
        """Return the windows, and how many each strip is expected to need."""
        from rsosm_cli.inference.windows import WindowPlan

        d = self.chosen.description
        plan = WindowPlan.of(
            self.projection.pixels_around(*self.local_place().bounds), tile_px=d.tile, overlap=self.settings.overlap,
            cell_px=cell_px, whole_steps=self.by_tile,
        )  # fmt: skip
        return plan, _expected(plan, self.windows(plan))

    def windows(self, plan: WindowPlan) -> CityWindows:
        """Return the windows without anything to read: enough to count them."""
        from rsosm_cli.inference.ground import CityWindows, Ground

        d = self.chosen.description
        bare = Ground(self.projection, d.tile, None, None, d.graph, None)
        return CityWindows(plan, bare, self.local_place(), self.settings.batch_size)

    def parts(self, plan: WindowPlan) -> MapParts:
        """Return the strips of this very map, finished or not."""
        from rsosm_cli.products.parts import MapParts
        from rsosm_cli.products.publish import layers_of

        s = self.settings
        layers = layers_of(self.task, plan.cell_px, probability=s.probability, uncertainty=s.uncertainty)
        return MapParts(self.folder / f".{self.name}.parts" / self.key(), plan, self.projection, layers)

    def raw_bytes(self, plan: WindowPlan) -> float:
        """Return the uncompressed size of the rasters that are written."""
        if self.by_tile:
            return 4 * max(1, len(self.task.classes)) * plan.area.width * plan.area.height / plan.cell_px**2
        layers = 1 + self.settings.uncertainty + self.settings.probability * len(self.task.classes)
        return layers * plan.area.width * plan.area.height


@dataclass(frozen=True)
class Strips:
    """What a mapping of strips took: ``cell_px`` pixels a cell of the head, ``seconds`` without loading the model."""

    cell_px: int
    seconds: float


def map_strips_of_rank(fabric: Fabric, progress: Progress, job: MapJob) -> Strips:
    """Map this rank's share of the strips; return when all ranks are done."""
    mine = map_strips(
        job, fabric.device, progress if fabric.global_rank == 0 else SILENT, rank=fabric.global_rank,
        world=fabric.world_size,
    )  # fmt: skip
    fabric.barrier()
    return mine


def map_strips(job: MapJob, where: torch.device, progress: Progress, *, rank: int = 0, world: int = 1) -> Strips:
    """Map the strips that are not there yet; of ``world`` processes, each takes neighbouring ones."""
    from rsosm_cli.inference.ground import CityWindows, ElementBand, Ground
    from rsosm_cli.inference.mapping import Layers, map_area
    from rsosm_cli.inference.pair import ImagePair
    from rsosm_cli.inference.predict import Predictor
    from rsosm_cli.inference.tags import TagTable
    from rsosm_cli.models.checkpoint import load_checkpoint
    from rsosm_cli.models.heads import TaskModel

    s, d, task = job.settings, job.chosen.description, job.task
    model = load_checkpoint(job.chosen.folder).model
    assert isinstance(model, TaskModel)
    cell_px = job.plan()[0].cell_px if job.by_tile else None
    predictor = Predictor(model, d, where, precision=s.precision, tta=s.tta, cell_px=cell_px)
    plan, windows = job.plan(predictor.cell_px)
    place = job.local_place()
    mine = {strip.name for strip in share_of(list(plan.strips()), windows, rank, world)}
    kind: Literal["segmentation", "tiles", "regression"]
    kind = "regression" if task.kind == "regression" else "segmentation" if task.dense else "tiles"
    drawn = Layers(
        kind, s.probability, s.uncertainty, shares=task.kind == "distribution", amounts=task.aggregate == "sum"
    )
    started = time.monotonic()
    with ExitStack() as stack:
        row = plan.tile_px, min(plan.area.width, plan.block_px)  # of windows
        readers = [stack.enter_context(opened_image(path, d.bands, row)) for path in job.images]
        found = [reader for reader in readers if reader is not None]
        image = ImagePair(*found) if len(found) == 2 else found[0] if found else None
        elements = ElementBand(job.osm_file, job.projection.crs) if job.osm_file is not None else None
        tags = TagTable(d, where, offline=job.offline) if elements is not None else None
        source = CityWindows(plan, Ground(job.projection, d.tile, image, elements, d.graph, tags), place, s.batch_size)
        total = sum(n for name, n in windows.items() if name in mine)
        advance = stack.enter_context(progress.task(f"map {job.name}: {job.ground.name}", total, "windows"))
        meter = _Meter(windows, advance)
        map_area(
            plan, source, predictor, job.parts(plan), channels=predictor.channels, layers=drawn,
            mask=_mask(job.projection, place), device=where, only=mine, on_batch=meter.batch, on_strip=meter.strip,
        )  # fmt: skip
    return Strips(plan.cell_px, time.monotonic() - started)


def share_of(strips: list[Strip], windows: Mapping[str, int], rank: int, world: int) -> list[Strip]:
    """Return the strips of a rank: neighbours, as few windows are computed twice then; about as many windows each."""
    import numpy as np

    cost = np.array([windows.get(s.name, 0) for s in strips], float)
    middle = np.cumsum(cost) - cost / 2
    owner = np.minimum((middle / max(cost.sum(), 1) * world).astype(int), world - 1)
    return [s for s, o in zip(strips, owner.tolist(), strict=True) if o == rank]


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
