"""The OSM elements of a fetch: from files, from Overpass, from the extract that covers the place."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rsosm_cli.address import display
from rsosm_cli.errors import MissingError, RsosmError, SourceError
from rsosm_cli.osm import geofabrik, overpass
from rsosm_cli.osm.completeness import Density, density
from rsosm_cli.osm.extract import is_osm_file, read_extract
from rsosm_cli.osm.sink import Counts, ElementSink
from rsosm_cli.osm.vectors import read_vector_elements
from rsosm_cli.pipeline.fetch_order import Order
from rsosm_cli.pipeline.fetch_parts import Report, finished, record
from rsosm_cli.places.place import OSM_SOURCE, Place
from rsosm_cli.units import size
from rsosm_cli.workspace import Workspace

log = logging.getLogger("rsosm")


@dataclass(frozen=True)
class _Input:
    """Files to read, their names for the record, and what else the manifest says of them."""

    files: Sequence[Path]
    names: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def osm_finished(order: Order, place: Place, place_key: str) -> bool:
    """Return whether the elements are there, unchanged, and of an extract or answers not too old."""
    manifest = order.files.manifest
    if order.force or not manifest.finished("fetch:osm", order.osm_key(place_key, place)):
        return False
    step = manifest.step("fetch:osm")
    asked = (step.get("extract") or {}).get("asked")
    if asked is None and not order.keep and order.settings.date is None:  # a past state does not change
        asked = (step.get("overpass") or {}).get("asked")
    if asked is None:
        return True
    return not geofabrik.is_old(datetime.fromisoformat(asked).timestamp(), order.settings.max_age_days)


def fetch_osm(order: Order, place: Place, place_key: str, report: Report) -> None:
    path, key = order.files.osm, order.osm_key(place_key, place)
    report.paths["osm"] = str(path)
    if osm_finished(order, place, place_key) and finished(order, "osm", key, report) is not None:
        return
    started = time.monotonic()
    source = _input(order, place)
    left_out: list[str] = []
    with ElementSink(path, place.geometry) as sink:
        for file in source.files:
            if is_osm_file(file):
                read_extract(file, sink, progress=order.progress)
            else:
                left_out += read_vector_elements(file, sink, progress=order.progress)
        if not sink.pending:
            box, held = (
                None if bounds is None else " ".join(f"{value:.4f}" for value in bounds)
                for bounds in (place.geometry.bounds, sink.read_bounds)
            )
            where = f"; those that it has lie in {held}" if held else ""
            raise MissingError(
                f"There is no tagged OSM object of {', '.join(source.names)} in {order.city} ({box}){where}.",
                hint=" ".join([*left_out, _nothing(order, place)]),
                outside=sink.counts.outside,
            )
    counts = sink.counts
    spread = density(path, place.geometry)
    numbers = {
        "points": counts.point,
        "lines": counts.line,
        "polygons": counts.polygon,
        "objects_per_km2": round(counts.total / place.area_km2, 1),
        **spread.numbers(),
    }
    facts = {"counts": counts.as_dict(), "inputs": source.names, "asked": order.osm_asked(), **source.facts}
    notes = [*source.notes, *left_out, *_notes(counts, spread, order.city, source.names)]
    record(order, "osm", key, path, started, numbers, notes, [OSM_SOURCE], report, **facts)


def _input(order: Order, place: Place) -> _Input:
    """Return the files to read, downloaded where they are elsewhere."""
    route, s = order.route(place), order.settings
    if route is None:
        return _Input(order.osm, [p.name for p in order.osm])
    if route == "geofabrik":
        if order.service == "auto":
            log.info(
                "%s has %.0f km², more than the %.0f km² asked of Overpass: the extract that covers it is taken.",
                order.city, place.area_km2, s.overpass_max_km2,
            )  # fmt: skip
        region = geofabrik.find_region(order.city, place.geometry, s, offline=order.offline)
        extract = geofabrik.get_extract(
            region, _extracts(order), s, offline=order.offline, fresh=order.force, progress=order.progress
        )
        return _Input([extract.path], [f"extract {region.name}"], {"extract": extract.as_dict()})
    overpass.refuse_large(order.city, place.area_km2, s)
    files = overpass.download(place.geometry, s, offline=order.offline, fresh=order.force, progress=order.progress)
    if s.date is not None:
        return _Input(files, ["Overpass"], {"date": s.date.isoformat()})
    answers = overpass.Answers.of(files)
    return _Input(files, ["Overpass"], {"overpass": answers.as_dict()}, [n for n in [answers.note()] if n])


def _nothing(order: Order, place: Place) -> str:
    """Return what to look at where a source has nothing in the place."""
    if order.route(place) is None:
        checks = ["Check that the file covers the place"]
    else:
        checks = ["Check that the place is the one meant"]
        if order.settings.date is not None:
            checks.append(f"that OSM had something there on {order.settings.date} already")
    if order.bbox is not None:
        checks.append("that --bbox has longitude before latitude")
    return f"{', and '.join(checks)}."


def _extracts(order: Order) -> Path:
    return Workspace(order.files.folder.parent.parent).extracts


def _notes(counts: Counts, spread: Density, city: str, names: Sequence[str]) -> list[str]:
    notes = []
    if counts.cut:
        # Where they lie is not known: what is not there are their nodes.
        notes.append(
            f"{counts.cut} objects of the whole of {', '.join(names)} are left out, in {city} or elsewhere: parts of "
            "them are not there."
        )
    if counts.mended or counts.invalid:
        notes.append(f"{counts.mended} invalid shapes are mended, {counts.invalid} are left out.")
    return notes + [note for note in [spread.note()] if note]


def plan_osm(order: Order, place: Place, place_key: str, numbers: dict[str, Any]) -> str:
    """Return a sentence on what would be read or downloaded, its size put into ``numbers``."""
    if osm_finished(order, place, place_key):
        return "The OSM elements are there and unchanged."
    route = order.route(place)
    if route is None:
        numbers["osm_read_mb"] = round(sum(p.stat().st_size for p in order.osm) / 1e6, 3)
        return f"OSM elements would be read from {', '.join(p.name for p in order.osm)}."
    if route == "geofabrik":
        return _plan_extract(order, place, numbers)
    overpass.refuse_large(order.city, place.area_km2, order.settings)
    numbers["osm_download_mb"] = round(overpass.estimate_mb(place.area_km2), 3)
    return f"About {size(overpass.estimate_mb(place.area_km2) * 1e6)} of OSM elements would be asked of Overpass."


def _plan_extract(order: Order, place: Place, numbers: dict[str, Any]) -> str:
    s = order.settings
    region = geofabrik.find_region(order.city, place.geometry, s, offline=order.offline)
    kept = geofabrik.kept_extract(region, _extracts(order))
    if kept is not None and (order.offline or not geofabrik.is_old(kept.asked, s.max_age_days)):
        numbers["osm_read_mb"] = round(kept.size / 1e6, 3)
        return f"OSM elements would be read from the extract {region.name}, which is there."
    if order.offline:
        raise SourceError(
            f"The extract {region.name} is on the network, and --offline forbids it.", hint=geofabrik.OTHER_WAYS
        )
    known = 0
    with suppress(RsosmError):  # a plan is worth having without it
        known = geofabrik.size_of(region, s)
    numbers["osm_download_mb"] = round(known / 1e6, 3)
    said = size(known) if known else "of unknown size"
    return f"The extract {region.name}, {said}, would be downloaded from {display(region.url)}."
