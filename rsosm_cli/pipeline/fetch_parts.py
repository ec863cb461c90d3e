"""The parts of a fetch: each skipped where it is there, else made and recorded. The place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsosm_cli.pipeline.fetch_order import Order
from rsosm_cli.places.find import find_place
from rsosm_cli.places.place import OSM_SOURCE, Place, read_place, write_place
from rsosm_cli.workspace import utc

PLACE_FOUND = ".place.geojson.found"  # a city's next place, until its elements are there


@dataclass
class Report:
    """What the parts of the work add to the result."""

    paths: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def finished(order: Order, part: str, key: str, report: Report) -> dict[str, Any] | None:
    """Return the record of a part that is there and unchanged, with its numbers and notes put into the report."""
    manifest = order.files.manifest
    if order.force or not manifest.finished(f"fetch:{part}", key):
        return None
    step = manifest.step(f"fetch:{part}")
    report.skipped.append(part)
    report.numbers.update(step.get("numbers", {}))
    report.notes += step.get("notes", [])
    return step


def record(
    order: Order, part: str, key: str, path: Path, started: float, numbers: dict[str, Any], notes: Sequence[str],
    sources: Sequence[dict[str, Any]], report: Report, **facts: Any,
) -> None:  # fmt: skip
    order.files.manifest.record(
        f"fetch:{part}", key, files=[path], seconds=time.monotonic() - started, numbers=numbers, notes=list(notes),
        sources=list(sources), **facts,
    )  # fmt: skip
    report.done.append(part)
    report.numbers.update(numbers)
    report.notes += notes


@contextmanager
def fetch_place(order: Order, key: str, report: Report) -> Iterator[Place]:
    """Find the place, for the elements in it to be fetched.

    A city that has elements keeps its place until those of the new one are there: on leaving, without an error, the
    place that was found replaces it. A city without elements has its place at once, so that a broken fetch goes on.
    """
    path = order.files.place
    report.paths["place"] = str(path)
    if finished(order, "place", key, report) is not None:
        yield read_place(path)
        return
    started = time.monotonic()
    place = find(order)
    facts: dict[str, Any] = {
        "osm_id": place.osm_id,
        "source": place.source,
        "country": place.country,
        "asked": order.place_asked(),
        "elements_asked": order.osm_asked(),
    }
    if place.asked is not None:
        facts["answered"] = utc(place.asked)
    found = path.with_name(PLACE_FOUND)
    write_place(found, place)

    def keep() -> None:
        found.replace(path)
        order.files.manifest.update(name=order.city)
        sources = [OSM_SOURCE] if place.from_osm else []
        numbers = {"area_km2": round(place.area_km2, 3)}
        record(order, "place", key, path, started, numbers, place.notes, sources, report, **facts)

    at_once = not (path.exists() and order.files.osm.exists())
    try:
        if at_once:
            keep()
        yield read_place(path if at_once else found)  # rounded as later steps read it
        if not at_once:
            keep()
    finally:
        found.unlink(missing_ok=True)


def find(order: Order) -> Place:
    if order.imagery:
        from rsosm_cli.imagery.prepare import check_own_rasters  # GDAL only where imagery is asked for

        check_own_rasters(order.imagery, order.settings)  # what cannot be used is known before anybody is asked
    return find_place(
        order.city,
        files=order.osm,
        boundary=order.boundary,
        bbox=order.bbox,
        osm_id=order.osm_id,
        settings=order.settings,
        offline=order.offline,
        fresh=order.force,
    )
