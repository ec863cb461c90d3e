"""``build-graph``: the tiles of a city, a heterograph each, in ``tiles.h5``."""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import MissingError, NoFileError, SourceError, UsageError
from rsosm_cli.geometry import WGS84, Grid
from rsosm_cli.pipeline.pool import run_jobs
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import BuildSettings, dump
from rsosm_cli.tiles.blocks import Block, build_block, split
from rsosm_cli.tiles.chips import CHIPS_A_BLOCK, Chip, ChipBlock, build_chips, common_crs, find_chips
from rsosm_cli.tiles.parts import assemble, finished
from rsosm_cli.tiles.store import VERSION
from rsosm_cli.workspace import Manifest, Workspace, file_stamp, fingerprint, locked, provenance, write_text

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

STEP = "build-graph"
# Graphs of a tile with some ten objects; only for the forecast of --dry-run.
_GRAPH_BYTES_A_TILE = 2_000


@dataclass(frozen=True)
class _Order:
    """What is asked for, resolved."""

    subject: str
    target: Path
    manifest: Manifest
    config: Path
    settings: BuildSettings
    osm: Path | None = None
    imagery: Path | None = None
    place: Geometry | None = None
    chips: tuple[Chip, ...] = ()
    sources: tuple[dict[str, str], ...] = ()
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # state of the city's files, for `info` to compare

    def key(self) -> str:
        inputs = [p for p in (self.osm, self.imagery) if p is not None]
        stamps = [file_stamp(p) for p in (*inputs, *(p for chip in self.chips for p in chip.files))]
        place = self.place.wkb_hex if self.place is not None else ""
        return fingerprint(VERSION, self.settings.model_dump(mode="json"), stamps, place)

    @property
    def provenance(self) -> dict[str, Any]:
        files = {"osm": self.osm, "imagery": self.imagery}
        names = {what: path.name for what, path in files.items() if path is not None}
        return {"city": self.subject, **names, "sources": list(self.sources)}


def build_graph(
    city: str | None = None,
    *,
    root: Path | None = None,
    osm: Path | None = None,
    imagery: Path | None = None,
    chips: Path | None = None,
    output: Path | None = None,
    settings: BuildSettings | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Tile a city, build a heterograph a tile, and write ``tiles.h5`` (or ``output``).

    ``osm`` (an ``osm.parquet``, or any OSM or vector file) and ``imagery`` (a raster) stand in for the city's files;
    without ``city`` they and ``output`` say everything, and the ground is the imagery's or else the elements' box.
    ``chips``: a folder of images with their vector files, or of ready graphs, a tile each, in place of a city.
    ``workers`` processes, or the workers of the Dask ``scheduler``, build blocks of tiles; the bytes written are the
    same whatever their number. A finished store whose inputs and settings have not changed is skipped, and finished
    blocks of one that was interrupted are kept, unless ``force``. Raises :class:`rsosm_cli.errors.RsosmError`.
    """
    started = time.monotonic()
    settings = settings or BuildSettings()
    if chips is not None:
        order = _order_chips(city, chips, output, settings, osm or imagery)
    else:
        order = _order(city, Workspace.at(root), osm, imagery, output, settings)
    key = order.key()
    if not force and order.manifest.finished(STEP, key):
        numbers = order.manifest.step(STEP).get("numbers", {})
        return _result(order, "skipped", numbers, order.manifest.step(STEP).get("notes", ()), started)
    plan = _Plan.of(order)
    if dry_run:
        return _planned(order, plan, started)
    with locked(order.target.parent, f"{order.target.name}.lock"):
        return _build(order, key, plan, started, workers, scheduler, force, progress)


@dataclass(frozen=True)
class _Plan:
    """The tiles to build: of a grid, or chips."""

    grid: Grid | None
    crs: str
    n_tiles: int
    has_images: bool

    @classmethod
    def of(cls, order: _Order) -> _Plan:
        if order.chips:
            chips = list(order.chips)
            return cls(None, common_crs(chips), len(chips), any(c.image is not None for c in chips))
        grid = _grid(order)
        return cls(grid, grid.projection.crs, len(grid), order.imagery is not None)

    @property
    def gsd_m(self) -> float | None:
        return None if self.grid is None else self.grid.projection.gsd_m


def _order_chips(
    city: str | None, chips: Path, output: Path | None, settings: BuildSettings, other: Path | None
) -> _Order:
    if city is not None or other is not None:
        raise UsageError("--chips takes the place of a city and its files.", hint="Give one or the other.")
    if output is None:
        output = chips / "tiles.h5"
    return _Order(chips.name, output, *_beside(output), settings, chips=tuple(find_chips(chips)))


def _order(
    city: str | None,
    workspace: Workspace,
    osm: Path | None,
    imagery: Path | None,
    output: Path | None,
    settings: BuildSettings,
) -> _Order:
    for path, what in ((osm, "OSM elements"), (imagery, "imagery")):
        if path is not None and not path.is_file():
            raise NoFileError(f"There is no file of {what} {path}.", path=str(path))
    if city is None:
        if osm is None or output is None:
            raise UsageError("Nothing says which city.", hint="Give --city NAME, or --osm FILE and --output FILE.")
        return _Order(output.stem, output, *_beside(output), settings, osm, imagery)
    from rsosm_cli.places.place import read_place

    files = workspace.city(city)
    if imagery is None and files.imagery.is_file():
        imagery = files.imagery
    if osm is None and files.folder.is_dir() and not files.osm.is_file():
        raise MissingError(f"{city} has no OSM elements.", hint=f"Fetch them: rsosm fetch --city {shlex.quote(city)}")
    target = output or files.tiles
    beside = _beside(output) if output is not None else (files.manifest, files.folder / f"config.{STEP}.yaml")
    place = read_place(workspace.place_of(city)).geometry
    sources = tuple(provenance(files.manifest.read()))
    return _Order(
        city, target, *beside, settings, osm or files.osm, imagery, place, sources=sources, inputs=files.sources()
    )


def _beside(output: Path) -> tuple[Manifest, Path]:
    """Return the manifest and the settings' file of a store that is written outside a city's folder."""
    return Manifest(output.with_name(output.name + ".manifest.json")), output.with_name(output.name + ".config.yaml")


def _grid(order: _Order) -> Grid:
    place = order.place if order.place is not None else _ground(order)
    grid = order.settings.grid
    cells = Grid.covering(place, tile_px=grid.tile, stride_px=grid.stride, gsd_m=grid.gsd)
    if order.imagery is not None:
        _check_meets(order.imagery, order.settings.bands, cells)
    return cells


def _ground(order: _Order) -> Geometry:
    """Return the box (WGS 84) of the imagery, or else of the OSM file."""
    import shapely

    from rsosm_cli.imagery.reader import ImageReader
    from rsosm_cli.osm.elements import read_elements
    from rsosm_cli.places.given import place_of_extract

    if order.imagery is not None:
        with ImageReader(order.imagery, order.settings.bands) as reader:
            return shapely.box(*reader.bounds_in(WGS84))
    assert order.osm is not None
    if not _is_element_file(order.osm):
        return place_of_extract(order.subject, [order.osm]).geometry
    elements = read_elements(order.osm)
    if not len(elements):
        raise MissingError(f"There are no OSM objects in {order.osm}.", hint="Give another file.")
    return shapely.box(*shapely.total_bounds(elements.geometry))


def _check_meets(imagery: Path, bands: Sequence[int], grid: Grid) -> None:
    from rsosm_cli.imagery.reader import ImageReader

    with ImageReader(imagery, bands) as reader:
        west, south, east, north = reader.bounds_in(grid.projection.crs)
    bounds = grid.bounds_m()
    if not ((bounds[:, 0] < east) & (bounds[:, 2] > west) & (bounds[:, 1] < north) & (bounds[:, 3] > south)).any():
        raise SourceError(
            f"The imagery {imagery} does not meet the city: it covers {west:.0f} to {east:.0f} east and {south:.0f} to "
            f"{north:.0f} north in {grid.projection.crs}.",
            hint="Give a raster of this place, or check the raster's CRS.",
        )


def _planned(order: _Order, plan: _Plan, started: float) -> Result:
    settings = order.settings
    image_bytes = len(settings.bands) * settings.grid.tile**2 if plan.has_images else 0
    numbers = {
        "tiles": plan.n_tiles,
        "megabytes_about": round(plan.n_tiles * (image_bytes + _GRAPH_BYTES_A_TILE) / 1e6, 1),
    }
    note = f"{order.target} would be written" + ("." if image_bytes else ", without images.")
    return _result(order, "planned", numbers, (note,), started)


def _build(
    order: _Order,
    key: str,
    plan: _Plan,
    started: float,
    workers: int,
    scheduler: str | None,
    force: bool,
    progress: Progress,
) -> Result:
    if not force and order.manifest.finished(STEP, key):  # another process built it while this one waited
        return _result(order, "skipped", order.manifest.step(STEP).get("numbers", {}), (), started)
    folder = order.target.with_name(f".{order.target.name}.{key}.parts")
    _clear(order.target, keep=None if force else folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        jobs = _jobs(order, plan, folder, progress)
        left = [job for job in jobs if not finished(job.part, plan.has_images)]
        if len(left) < len(jobs):
            log.info("%d of %d blocks of an interrupted build are kept.", len(jobs) - len(left), len(jobs))
        with progress.task("build-graph", plan.n_tiles, "tiles") as advance:
            advance(plan.n_tiles - sum(map(len, left)))
            for tiles in run_jobs(_work, left, workers=workers, scheduler=scheduler):
                advance(tiles)
    except BaseException:
        with suppress(OSError):  # finished blocks stay for the next time; without any, nothing does
            folder.rmdir()
        raise
    counts = assemble(
        order.target,
        [job.part for job in jobs],
        settings=order.settings,
        crs=plan.crs,
        gsd_m=plan.gsd_m,
        provenance=order.provenance,
        has_images=plan.has_images,
    )
    write_text(order.config, dump(order.settings))
    notes = _notes(counts, plan)
    if order.place is not None:
        order.manifest.update(name=order.subject)
    order.manifest.record(
        STEP, key, files=[order.target, order.config], seconds=time.monotonic() - started, numbers=counts,
        notes=list(notes), sources=list(order.sources), inputs=order.inputs,
    )  # fmt: skip
    shutil.rmtree(folder)
    return _result(order, "done", counts, notes, started)


def _jobs(order: _Order, plan: _Plan, folder: Path, progress: Progress) -> list[Block] | list[ChipBlock]:
    def part(number: int) -> Path:
        return folder / f"block-{number:05d}.npz"

    if plan.grid is None:
        chips, step = order.chips, CHIPS_A_BLOCK
        return [
            ChipBlock(part(i // step), i, chips[i : i + step], plan.crs, plan.has_images, order.settings)
            for i in range(0, len(chips), step)
        ]
    osm = _as_elements(order, folder, progress)
    return [
        Block(part(number), grid, osm, order.imagery, order.settings)
        for number, grid in enumerate(split(plan.grid, osm))
    ]


def _work(job: Block | ChipBlock) -> int:
    return build_block(job) if isinstance(job, Block) else build_chips(job)


def _clear(target: Path, keep: Path | None) -> None:
    """Remove the parts of interrupted builds from other inputs or settings."""
    for folder in target.parent.glob(f".{target.name}.*.parts"):
        if folder != keep:
            shutil.rmtree(folder)


def _is_element_file(path: Path) -> bool:
    from rsosm_cli.osm.extract import is_osm_file
    from rsosm_cli.osm.vectors import is_vector_file

    return path.suffix == ".parquet" or not (is_osm_file(path) or is_vector_file(path))


def _as_elements(order: _Order, folder: Path, progress: Progress) -> Path:
    """Return an element file: the one given, or what another OSM or vector file becomes."""
    from rsosm_cli.osm.extract import is_osm_file, read_extract
    from rsosm_cli.osm.sink import ElementSink
    from rsosm_cli.osm.vectors import read_vector_elements

    assert order.osm is not None
    if _is_element_file(order.osm):
        return order.osm
    elements = folder / "osm.parquet"
    if not elements.is_file():
        with ElementSink(elements, order.place) as sink:
            if is_osm_file(order.osm):
                read_extract(order.osm, sink, progress=progress)
            else:
                for note in read_vector_elements(order.osm, sink, progress=progress):
                    log.info(note)
    return elements


def _notes(counts: dict[str, int], plan: _Plan) -> tuple[str, ...]:
    notes = []
    if not counts["points"] + counts["lines"] + counts["polygons"]:
        notes.append("No OSM object meets the tiles: they hold images alone.")
    if counts.get("mended") or counts.get("dropped"):
        notes.append(f"{counts['mended']} invalid geometries were mended, {counts['dropped']} dropped.")
    if counts.get("boundaries"):
        notes.append(
            f"{counts['boundaries']} objects are administrative boundaries and the like alone, and are left out "
            "(graph.leave_out)."
        )
    if counts.get("untagged"):
        notes.append(f"{counts['untagged']} objects have no tag that the settings let in, and are left out.")
    if not plan.has_images:
        notes.append("There is no imagery: the tiles hold OSM alone.")
    return tuple(notes)


def _result(order: _Order, status: Any, numbers: dict[str, Any], notes: Sequence[str], started: float) -> Result:
    return Result(
        command=STEP,
        subject=order.subject,
        status=status,
        paths={"tiles": str(order.target)},
        numbers=numbers,
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )
