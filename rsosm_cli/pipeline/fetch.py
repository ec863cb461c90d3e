"""``fetch``: the boundary, the OSM elements and the imagery of a city."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.imagery.service import display, tile_service
from rsosm_cli.osm.extract import is_osm_file, read_extract
from rsosm_cli.osm.overpass import download, estimate_mb, refuse_large
from rsosm_cli.osm.sink import ElementSink
from rsosm_cli.osm.vectors import is_vector_file, read_vector_elements
from rsosm_cli.pipeline.result import Result
from rsosm_cli.places.find import find_place
from rsosm_cli.places.place import OSM_SOURCE, Place, read_place, write_place
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings, RootSettings, load_yaml, validate
from rsosm_cli.workspace import CityFiles, Workspace, file_stamp, fingerprint, locked, write_text

if TYPE_CHECKING:
    from rsosm_cli.imagery.prepare import ImageryInfo

log = logging.getLogger("rsosm")

FORMAT = 1  # raised when place.geojson or osm.parquet change, so that old ones are fetched again
HOW_TO_ADD_IMAGERY = (
    "No imagery was named: vectors alone are fetched. Add it with --imagery FILE.tif or an XYZ template, with "
    "RSOSM_IMAGERY, or with the key `imagery` of config.yaml under the root."
)
PARTS = ("place", "osm", "imagery")


@dataclass(frozen=True)
class _Order:
    """What is asked for, resolved."""

    city: str
    files: CityFiles
    osm: tuple[Path, ...]  # empty: Overpass
    keep: bool  # nothing says where place and OSM are from: what is there stays
    imagery: tuple[str, ...]
    boundary: str | None
    bbox: tuple[float, float, float, float] | None
    osm_id: str | None
    gsd: float | None
    settings: FetchSettings
    offline: bool
    force: bool
    progress: Progress

    def config(self) -> dict[str, Any]:
        """Return the resolved settings as they are written beside the results."""
        return {
            "city": self.city,
            "osm": "kept" if self.keep else [str(p) for p in self.osm] or ["overpass"],
            "imagery": self.shown_imagery(),
            "boundary": self.boundary,
            "bbox": None if self.bbox is None else list(self.bbox),
            "osm_id": self.osm_id,
            "gsd": self.gsd,
            **self.settings.model_dump(mode="json"),
        }

    def shown_imagery(self) -> list[str]:
        """Return the imagery as it may be recorded: keys and passwords in addresses hidden."""
        if not self.imagery:
            return []

        return [display(source) for source in self.imagery]

    def place_key(self) -> str:
        if self.keep:
            return str(self.files.manifest.step("fetch:place")["key"])
        from_files = self.bbox is None and (self.boundary in (None, "extract"))
        stamps = [file_stamp(p) for p in self.osm] if from_files else []
        if self.boundary not in (None, "extract", "nominatim"):
            stamps.append(file_stamp(Path(self.boundary)))
        server = self.settings.nominatim_url if not stamps else ""
        return fingerprint(FORMAT, self.city, self.boundary, self.bbox, self.osm_id, server, stamps)

    def osm_key(self, place_key: str) -> str:
        if self.keep:
            return str(self.files.manifest.step("fetch:osm")["key"])
        stamps = [file_stamp(p) for p in self.osm]
        return fingerprint(FORMAT, place_key, stamps, "" if stamps else self.settings.overpass_url)

    def imagery_key(self, place_key: str) -> str:
        if not self.imagery:
            return ""
        from rsosm_cli.imagery.prepare import raster_paths

        sources: list[Any] = []
        for source in self.imagery:
            if tile_service(source) is not None:
                sources.append(source)
            else:  # local files by what they are now, addresses by name
                paths = [Path(p) for p in raster_paths(source)]
                sources += [file_stamp(p) if p.is_file() else str(p) for p in paths]
        return fingerprint(FORMAT, place_key, sources, self.gsd, self.settings.xyz_zoom, self.settings.nodata)


@dataclass
class _Report:
    """What the parts of the work add to the result."""

    paths: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def fetch(
    city: str,
    *,
    root: Path | None = None,
    osm: Sequence[str | Path] = (),
    imagery: Sequence[str] = (),
    boundary: str | Path | None = None,
    bbox: tuple[float, float, float, float] | None = None,
    osm_id: str | None = None,
    gsd: float | None = None,
    settings: FetchSettings | None = None,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Fetch a city into ``<root>/cities/<slug>``: ``place.geojson``, ``osm.parquet`` and, where named, ``imagery.tif``.

    ``osm``: paths of extracts and vector files, or ``"overpass"`` (also where empty). ``imagery``: paths of rasters,
    XYZ templates, xyzservices names; by default those of ``RSOSM_IMAGERY`` or ``<root>/config.yaml``. ``boundary``: a
    vector file, ``"extract"`` (the box of the OSM files) or ``"nominatim"``; ``bbox``: west, south, east, north in
    degrees. ``gsd``: metres a pixel to fetch tile services at.

    What is there and unchanged is skipped; ``dry_run`` tells what would be read and how large it is. Raises
    :class:`rsosm_cli.errors.RsosmError` in its kinds.
    """
    started = time.monotonic()
    workspace = Workspace.at(root)
    defaults = root_settings(workspace)
    settings = settings or FetchSettings()
    if not settings.contact and defaults.contact:
        settings = settings.model_copy(update={"contact": defaults.contact})
    files = workspace.city(city)
    said = bool(osm) or any(value is not None for value in (boundary, bbox, osm_id))
    order = _Order(
        city=city,
        files=files,
        keep=not said and not force and _both_there(files),
        osm=_osm_files(osm),
        imagery=tuple(imagery) or _imagery_of_environment() or defaults.imagery,
        boundary=None if boundary is None else str(boundary),
        bbox=bbox,
        osm_id=osm_id,
        gsd=gsd if gsd is not None else defaults.gsd,
        settings=settings,
        offline=offline,
        force=force,
        progress=progress,
    )
    _check_paths(order)
    if dry_run:
        return _plan(order)
    # Two processes may fetch one city: the second waits here, and then finds everything done. The lock lies beside the
    # city's folder, so that a name that is not found leaves no empty city behind.
    with locked(files.folder.parent, f"{files.folder.name}.fetch.lock"):
        _sweep(files.folder)
        return _fetch(order, started)


def _both_there(files: CityFiles) -> bool:
    manifest = files.manifest
    return all(manifest.finished(f"fetch:{p}", manifest.step(f"fetch:{p}").get("key", "-")) for p in ("place", "osm"))


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half done; only called while the city's lock is held."""
    for left in folder.glob(".osm-*"):
        shutil.rmtree(left, ignore_errors=True)
    for name in ("place.geojson", "osm.parquet"):
        for part in folder.glob(f".{name}.*.part"):
            part.unlink(missing_ok=True)


def root_settings(workspace: Workspace) -> RootSettings:
    """Return the user's defaults of a root. Raises :class:`UsageError` naming file and key."""
    path = workspace.root / "config.yaml"
    return validate(RootSettings, load_yaml(path), str(path)) if path.is_file() else RootSettings()


def _imagery_of_environment() -> tuple[str, ...]:
    value = os.environ.get("RSOSM_IMAGERY", "").strip()
    return (value,) if value else ()


def _osm_files(osm: Sequence[str | Path]) -> tuple[Path, ...]:
    if isinstance(osm, str | Path):
        osm = [osm]
    if "overpass" in [str(o) for o in osm]:
        if len(osm) > 1:
            raise UsageError("--osm overpass excludes other sources of OSM elements.", hint="Give one or the other.")
        return ()
    files = tuple(Path(o) for o in osm)
    for path in files:
        if not path.is_file():
            raise MissingError(f"There is no OSM file {path}.", hint="Give a file, or --osm overpass")
        if not is_osm_file(path) and not is_vector_file(path):
            raise UsageError(
                f"{path.name} is neither an OSM file nor a vector file.",
                hint="Known: .osm.pbf, .osm.gz, .osm.bz2, .osm, .gpkg, .geojson, .parquet, .shp.",
            )
    return files


def _check_paths(order: _Order) -> None:
    if order.boundary not in (None, "extract", "nominatim") and not Path(order.boundary).is_file():
        raise MissingError(
            f"There is no boundary file {order.boundary}.",
            hint="--boundary takes a vector file, or the word extract or nominatim.",
        )


def _fetch(order: _Order, started: float) -> Result:
    report = _Report()
    files, manifest = order.files, order.files.manifest
    config = yaml.safe_dump(order.config(), sort_keys=True, allow_unicode=True)
    place_key = order.place_key()
    place = _fetch_place(order, place_key, report)
    _check_rasters(order, place)
    _fetch_osm(order, place, place_key, report)
    image = _fetch_imagery(order, place, place_key, report)
    key = fingerprint(place_key, order.osm_key(place_key), order.imagery_key(place_key))
    if order.keep and report.done:
        report.notes.append("The place and the OSM elements that are there are kept.")
    if report.done or not manifest.finished("fetch", key):
        write_text(files.folder / "config.fetch.yaml", config)
        written = [files.folder / "config.fetch.yaml", files.place, files.osm]
        sources = [s for part in PARTS for s in manifest.step(f"fetch:{part}").get("sources", [])]
        manifest.update(name=order.city)
        manifest.record(
            "fetch",
            key,
            files=[p for p in [*written, files.imagery if image else None] if p is not None],
            seconds=time.monotonic() - started,
            sources=[s for i, s in enumerate(sources) if s not in sources[:i]],
            numbers=report.numbers,
            notes=report.notes,
        )
    return Result(
        command="fetch",
        subject=order.city,
        status="done" if report.done else "skipped",
        paths=report.paths,
        numbers=report.numbers,
        notes=tuple(report.notes),
        seconds=time.monotonic() - started,
    )


def _finished(order: _Order, part: str, key: str, report: _Report) -> dict[str, Any] | None:
    """Return the record of a part that is there and unchanged, with its numbers and notes put into the report."""
    manifest = order.files.manifest
    if order.force or not manifest.finished(f"fetch:{part}", key):
        return None
    step = manifest.step(f"fetch:{part}")
    report.skipped.append(part)
    report.numbers.update(step.get("numbers", {}))
    report.notes += step.get("notes", [])
    return step


def _record(
    order: _Order, part: str, key: str, path: Path, started: float, numbers: dict[str, Any], notes: Sequence[str],
    sources: Sequence[dict[str, Any]], report: _Report, **facts: Any,
) -> None:  # fmt: skip
    order.files.manifest.record(
        f"fetch:{part}", key, files=[path], seconds=time.monotonic() - started, numbers=numbers, notes=list(notes),
        sources=list(sources), **facts,
    )  # fmt: skip
    report.done.append(part)
    report.numbers.update(numbers)
    report.notes += notes


def _fetch_place(order: _Order, key: str, report: _Report) -> Place:
    path = order.files.place
    report.paths["place"] = str(path)
    if _finished(order, "place", key, report) is not None:
        return read_place(path)
    started = time.monotonic()
    place = _find(order)
    write_place(path, place)
    order.files.manifest.update(name=order.city)
    sources = [OSM_SOURCE] if place.from_osm else []
    numbers = {"area_km2": round(place.area_km2, 3)}
    facts = {"osm_id": place.osm_id, "source": place.source, "country": place.country}
    _record(order, "place", key, path, started, numbers, place.notes, sources, report, **facts)
    return read_place(path)  # rounded as later steps read it


def _find(order: _Order) -> Place:
    return find_place(
        order.city,
        files=order.osm,
        boundary=order.boundary,
        bbox=order.bbox,
        osm_id=order.osm_id,
        settings=order.settings,
        offline=order.offline,
    )


def _fetch_osm(order: _Order, place: Place, place_key: str, report: _Report) -> None:
    path, key = order.files.osm, order.osm_key(place_key)
    report.paths["osm"] = str(path)
    if _finished(order, "osm", key, report) is not None:
        return
    started = time.monotonic()
    sources: Sequence[Path] = order.osm
    if not sources:
        refuse_large(order.city, place.area_km2, order.settings)
        sources = download(
            place.geometry, order.settings, offline=order.offline, fresh=order.force, progress=order.progress
        )
    with ElementSink(path, place.geometry) as sink:
        for source in sources:
            if is_osm_file(source):
                read_extract(source, sink, progress=order.progress)
            else:
                read_vector_elements(source, sink, progress=order.progress)
        if not sink.pending:
            where = ", ".join(p.name for p in order.osm) or "Overpass"
            raise MissingError(
                f"There is no tagged OSM object of {where} in {order.city} ({_box_text(place)}).",
                hint="Check that the file covers the place.",
                outside=sink.counts.outside,
            )
    counts = sink.counts
    numbers = {
        "points": counts.point,
        "lines": counts.line,
        "polygons": counts.polygon,
        "objects_per_km2": round(counts.total / place.area_km2, 1),
    }
    facts = {"counts": counts.as_dict(), "inputs": [p.name for p in order.osm] or ["Overpass"]}
    _record(order, "osm", key, path, started, numbers, _osm_notes(counts), [OSM_SOURCE], report, **facts)


def _box_text(place: Place) -> str:
    return " ".join(f"{value:.4f}" for value in place.geometry.bounds)


def _osm_notes(counts: Any) -> list[str]:
    notes = []
    if counts.cut:
        notes.append(f"{counts.cut} objects are left out: parts of them are not in the file.")
    if counts.mended or counts.invalid:
        notes.append(f"{counts.mended} invalid shapes are mended, {counts.invalid} are left out.")
    return notes


def _fetch_imagery(order: _Order, place: Place, place_key: str, report: _Report) -> bool:
    """Make ``imagery.tif``; return whether there is one."""
    path = order.files.imagery
    if not order.imagery:
        if path.exists():
            report.paths["imagery"] = str(path)
            report.notes.append("The imagery that is there is kept.")
            return True
        report.notes.append(HOW_TO_ADD_IMAGERY)
        return False
    report.paths["imagery"] = str(path)
    key = order.imagery_key(place_key)
    if _finished(order, "imagery", key, report) is not None:
        return True
    started = time.monotonic()
    info = _prepare(order, place, dry_run=False)
    numbers = {"imagery_bytes": info.size_bytes, "imagery_bands": info.bands}
    known = {"path", "notes", "sources", "bands", "size_bytes"}
    facts = {name: value for name, value in info.as_dict().items() if name not in known}
    _record(order, "imagery", key, path, started, numbers, info.notes, info.sources, report, **facts)
    return True


def _check_rasters(order: _Order, place: Place) -> None:
    """Say what cannot work of the user's own rasters before the OSM source, which may be large, is read."""
    if order.imagery and not any("://" in s or tile_service(s) is not None for s in order.imagery):
        _prepare(order, place, dry_run=True)


def _prepare(order: _Order, place: Place, *, dry_run: bool) -> ImageryInfo:
    from rsosm_cli.imagery.prepare import prepare_imagery  # GDAL only where imagery is asked for

    if order.offline and not dry_run:
        remote = [s for s in order.imagery if "://" in s or s.startswith("/vsi") or tile_service(s) is not None]
        if remote:
            raise UsageError(
                f"The imagery {display(remote[0])} is on the network, and --offline forbids it.",
                hint="Give rasters: --imagery FILE.tif",
            )
    return prepare_imagery(
        order.imagery,
        place.geometry,
        order.files.folder,
        order.files.imagery,
        gsd_m=order.gsd,
        settings=order.settings,
        progress=order.progress,
        dry_run=dry_run,
    )


def _plan(order: _Order) -> Result:
    """Return what a run would read and download, and how large it is; nothing is written under the root."""
    place_key = order.place_key()
    manifest = order.files.manifest
    notes: list[str] = []
    finished = {
        "place": manifest.finished("fetch:place", place_key),
        "osm": manifest.finished("fetch:osm", order.osm_key(place_key)),
        "imagery": manifest.finished("fetch:imagery", order.imagery_key(place_key)) or not order.imagery,
    }
    if order.force:
        finished = dict.fromkeys(PARTS, False)
    place = read_place(order.files.place) if finished["place"] else _find(order)
    notes += place.notes
    numbers: dict[str, Any] = {"area_km2": round(place.area_km2, 3)}
    if finished["osm"]:
        notes.append("The OSM elements are there and unchanged.")
    elif order.osm:
        numbers["osm_read_mb"] = round(sum(p.stat().st_size for p in order.osm) / 1e6, 3)
        notes.append(f"OSM elements would be read from {', '.join(p.name for p in order.osm)}.")
    else:
        refuse_large(order.city, place.area_km2, order.settings)
        numbers["osm_download_mb"] = round(estimate_mb(place.area_km2), 1)
        notes.append(f"About {numbers['osm_download_mb']:g} MB of OSM elements would be asked of Overpass.")
    if not order.imagery:
        notes.append(HOW_TO_ADD_IMAGERY)
    elif finished["imagery"]:
        notes.append("The imagery is there and unchanged.")
    else:
        info = _prepare(order, place, dry_run=True)
        numbers["imagery_mb"] = round(info.size_bytes / 1e6, 3)
        notes += info.notes
    return Result("fetch", order.city, "planned", numbers=numbers, notes=tuple(notes))
