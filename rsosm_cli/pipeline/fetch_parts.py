"""The parts of a fetch: each skipped where it is there, else made and recorded. Place and imagery."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.address import display
from rsosm_cli.errors import UsageError
from rsosm_cli.imagery.service import is_tile_service
from rsosm_cli.pipeline.fetch_order import Order
from rsosm_cli.places.find import find_place
from rsosm_cli.places.place import OSM_SOURCE, Place, read_place, write_place

if TYPE_CHECKING:
    from rsosm_cli.imagery.prepare import ImageryInfo

log = logging.getLogger("rsosm")

HOW_TO_ADD_IMAGERY = (
    "No imagery was named: vectors alone are fetched. Add it with --imagery FILE.tif or an XYZ template, with "
    "RSOSM_IMAGERY, or with the key `imagery` of config.yaml under the root."
)


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


def fetch_place(order: Order, key: str, report: Report) -> Place:
    path = order.files.place
    report.paths["place"] = str(path)
    if finished(order, "place", key, report) is not None:
        return read_place(path)
    started = time.monotonic()
    place = find(order)
    write_place(path, place)
    order.files.manifest.update(name=order.city)
    sources = [OSM_SOURCE] if place.from_osm else []
    numbers = {"area_km2": round(place.area_km2, 3)}
    facts = {"osm_id": place.osm_id, "source": place.source, "country": place.country}
    record(order, "place", key, path, started, numbers, place.notes, sources, report, **facts)
    return read_place(path)  # rounded as later steps read it


def find(order: Order) -> Place:
    return find_place(
        order.city,
        files=order.osm,
        boundary=order.boundary,
        bbox=order.bbox,
        osm_id=order.osm_id,
        settings=order.settings,
        offline=order.offline,
    )


def fetch_imagery(order: Order, place: Place, place_key: str, report: Report) -> bool:
    """Make the image (``imagery.tif``, or that of an epoch); return whether there is one."""
    path = order.image
    if not order.imagery:
        if path.exists():
            report.paths["imagery"] = str(path)
            report.notes.append("The imagery that is there is kept.")
            return True
        report.notes.append(HOW_TO_ADD_IMAGERY)
        return False
    report.paths["imagery"] = str(path)
    key = order.imagery_key(place_key)
    if finished(order, order.image_part, key, report) is not None:
        return True
    started = time.monotonic()
    info = prepare(order, place, dry_run=False)
    numbers = {"imagery_bytes": info.size_bytes, "imagery_bands": info.bands}
    known = {"path", "notes", "sources", "bands", "size_bytes"}
    facts = {name: value for name, value in info.as_dict().items() if name not in known}
    if order.epoch is not None:
        facts["epoch"] = order.epoch
    record(order, order.image_part, key, path, started, numbers, info.notes, info.sources, report, **facts)
    return True


def check_rasters(order: Order, place: Place) -> None:
    """Say what cannot work of the user's own rasters before the OSM source, which may be large, is read."""
    if order.imagery and not any("://" in s or is_tile_service(s) for s in order.imagery):
        prepare(order, place, dry_run=True)


def prepare(order: Order, place: Place, *, dry_run: bool) -> ImageryInfo:
    from rsosm_cli.imagery.prepare import prepare_imagery  # GDAL only where imagery is asked for

    if order.offline and not dry_run:
        remote = [s for s in order.imagery if "://" in s or s.startswith("/vsi") or is_tile_service(s)]
        if remote:
            raise UsageError(
                f"The imagery {display(remote[0])} is on the network, and --offline forbids it.",
                hint="Give rasters: --imagery FILE.tif",
            )
    return prepare_imagery(
        order.imagery,
        place.geometry,
        order.files.folder,
        order.image,
        gsd_m=order.gsd,
        settings=order.settings,
        progress=order.progress,
        dry_run=dry_run,
    )
