"""``fetch``: the boundary, the OSM elements and the imagery of a city."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rsosm_cli.pipeline.fetch_imagery import (
    check_rasters,
    check_recorded,
    fetch_imagery,
    plan_imagery,
    with_recorded_imagery,
)
from rsosm_cli.pipeline.fetch_order import Order, resolve_order
from rsosm_cli.pipeline.fetch_osm import fetch_osm, plan_osm
from rsosm_cli.pipeline.fetch_parts import PLACE_FOUND, Report, fetch_place, find
from rsosm_cli.pipeline.result import Result
from rsosm_cli.places.place import read_place
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import Workspace, fingerprint, locked, write_text

# What fetch writes before it is renamed, by any process; GDAL adds .ovr.tmp and the like while it copies.
_HALF_DONE = re.compile(
    r"\.(\.place\.geojson\.found|osm\.parquet|config\.fetch\.yaml|imagery(-.+)?\.tif)\.\d+\.(part|plain\.tif)"
)
SAME_PLACE = "The place is asked for as last time; --bbox, --boundary or --osm-id ask for another."


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
    epoch: str | None = None,
    settings: FetchSettings | None = None,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Fetch a city into ``<root>/cities/<slug>``: ``place.geojson``, ``osm.parquet`` and, where named, ``imagery.tif``.

    ``osm``: paths of extracts and vector files, or ``"overpass"``, or ``"geofabrik"`` (the smallest public extract that
    covers the place); by default Overpass for a small place, the extract above ``settings.overpass_max_km2``.
    ``imagery``: paths of rasters, XYZ templates, xyzservices names; by default those of ``RSOSM_IMAGERY`` or
    ``<root>/config.yaml``. ``boundary``: a vector file, ``"extract"`` (the box of the OSM files) or ``"nominatim"``;
    ``bbox``: west, south, east, north in degrees. ``gsd``: metres a pixel to fetch tile services at. ``epoch``: a name
    (``"2019"``) under which the imagery is kept beside the others of the city, as ``imagery-2019.tif``.

    What is there and unchanged is skipped; ``dry_run`` tells what would be read and how large it is. Raises
    :class:`rsosm_cli.errors.RsosmError` in its kinds.
    """
    started = time.monotonic()
    order = resolve_order(
        city,
        Workspace.at(root),
        osm=osm,
        imagery=imagery,
        boundary=boundary,
        bbox=bbox,
        osm_id=osm_id,
        gsd=gsd,
        epoch=epoch,
        settings=settings or FetchSettings(),
        offline=offline,
        force=force,
        progress=progress,
    )
    check_recorded(order)
    if dry_run:
        return _plan(order)
    folder = order.files.folder
    # Two processes may fetch one city: the second waits here, and then finds everything done. The lock lies beside the
    # city's folder, so that a name that is not found leaves no empty city behind.
    with locked(folder.parent, f"{folder.name}.fetch.lock"):
        _sweep(folder)
        return _fetch(order, started)


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half done; only called while the city's lock is held.

    What other commands write into the folder has locks of its own and is left alone. The parts of an image lie deeper,
    among the tiles, and are removed where it is made.
    """
    if not folder.is_dir():
        return
    for left in folder.glob(".osm-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.iterdir():
        if left.name == PLACE_FOUND or _HALF_DONE.match(left.name):
            left.unlink(missing_ok=True)
    with locked(folder, "manifest.lock"):  # every command writes it
        for left in folder.glob(".manifest.json.*.part"):
            left.unlink(missing_ok=True)


def _fetch(order: Order, started: float) -> Result:
    report = Report()
    files, manifest = order.files, order.files.manifest
    config = yaml.safe_dump(order.config(), sort_keys=True, allow_unicode=True)
    place_key = order.place_key()
    with fetch_place(order, place_key, report) as place:
        order = with_recorded_imagery(order, place)
        check_rasters(order, place)
        fetch_osm(order, place, place_key, report)
    image = fetch_imagery(order, place, place_key, report)
    key = fingerprint(place_key, order.osm_key(place_key, place), order.imagery_key(place_key), order.epoch)
    if order.keep and order.settings.max_age_days is not None:
        report.notes.append("The OSM elements that are there are of own files or of a past day: --max-age leaves them.")
    if order.same_place:
        report.notes.append(SAME_PLACE)
    if order.keep and report.done:
        report.notes.append("The place and the OSM elements that are there are kept.")
    if report.done or not manifest.finished("fetch", key):
        write_text(files.folder / "config.fetch.yaml", config)
        written = [files.folder / "config.fetch.yaml", files.place, files.osm]
        parts = [name for name in manifest.read().get("steps", {}) if name.startswith("fetch:")]
        sources = [s for part in parts for s in manifest.step(part).get("sources", [])]
        manifest.update(name=order.city)
        manifest.record(
            "fetch",
            key,
            files=[*written, *([order.image] if image else [])],
            seconds=time.monotonic() - started,
            sources=[s for i, s in enumerate(sources) if s not in sources[:i]],
            numbers=report.numbers,
            notes=report.notes,
            # By these a later fetch that changed a part, and never came to its end, is told.
            parts={name: manifest.step(name)["key"] for name in parts},
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


def _plan(order: Order) -> Result:
    """Return what a run would read and download, and how large it is; nothing is written under the root."""
    place_key = order.place_key()
    manifest = order.files.manifest
    there = manifest.finished("fetch:place", place_key) and not order.force
    place = read_place(order.files.place) if there else find(order)
    notes = [*place.notes, *([SAME_PLACE] if order.same_place else [])]
    numbers: dict[str, Any] = {"area_km2": round(place.area_km2, 3)}
    notes.append(plan_osm(order, place, place_key, numbers))
    order = with_recorded_imagery(order, place)
    notes += plan_imagery(order, place, place_key, numbers)
    return Result("fetch", order.city, "planned", numbers=numbers, notes=tuple(notes))
