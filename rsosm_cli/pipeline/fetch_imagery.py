"""The imagery of a fetch: made from its sources, kept, or made again where the place has changed."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.address import display
from rsosm_cli.errors import MissingError, NoFileError, SourceError, UsageError
from rsosm_cli.imagery.service import is_described, is_tile_service
from rsosm_cli.pipeline.fetch_order import Order
from rsosm_cli.pipeline.fetch_parts import Report, finished, record
from rsosm_cli.pipeline.images import faults, ground
from rsosm_cli.places.place import Place
from rsosm_cli.workspace import IMAGERY_NOT_YET

if TYPE_CHECKING:
    from rsosm_cli.imagery.prepare import ImageryInfo

_HALF_DONE = re.compile(r"\..+\.\d+\.part")  # as workspace.atomic names them
HOW_TO_ADD_IMAGERY = (
    "No imagery was named: vectors alone are fetched. Add it with --imagery FILE.tif or an XYZ template, with "
    "RSOSM_IMAGERY, or with the key `imagery` of config.yaml under the root."
)
_GO_ON = "The imagery asked for before was broken off, and is not named now. To go on with it, add {}"


def fetch_imagery(order: Order, place: Place, place_key: str, report: Report) -> bool:
    """Make the image (``imagery.tif``, or that of an epoch); return whether there is one."""
    path = order.image
    others = [epoch for epoch in order.files.epochs() if epoch != order.epoch]
    report.notes += [fault.note for epoch in others for fault in faults(order.files, place, epoch)]
    if not order.imagery:
        if path.exists():
            report.paths["imagery"] = str(path)
            report.notes += _kept(order, place)
            return True
        report.notes += _not_yet(order) or [HOW_TO_ADD_IMAGERY]
        return False
    report.paths["imagery"] = str(path)
    key = order.imagery_key(place_key)
    if _readable(order, place) and finished(order, order.image_part, key, report) is not None:
        _await(order, [])
        return True
    started = time.monotonic()
    _sweep(path.with_suffix(""))
    inputs = [_recorded(source) for source in order.imagery]
    _await(order, _asked(order, inputs))
    info = prepare(order, place, dry_run=False)
    numbers = {"imagery_bytes": info.size_bytes, "imagery_bands": info.bands}
    known = {"notes", "sources", "bands", "size_bytes"}
    facts = {name: value for name, value in info.as_dict().items() if name not in known}
    if order.epoch is not None:
        facts["epoch"] = order.epoch
    facts |= {"inputs": inputs, "place": ground(place)}
    record(order, order.image_part, key, path, started, numbers, info.notes, info.sources, report, **facts)
    _await(order, [])
    return True


def _readable(order: Order, place: Place) -> bool:
    """Whether what the image is made of is there: the same raster may have another place since."""
    return not any(fault.useless for fault in faults(order.files, place, order.epoch))


def _await(order: Order, words: list[str]) -> None:
    """Record by which words the city's image that is about to be made was asked for; none, when it is there."""
    manifest = order.files.manifest
    if order.epoch is None and manifest.read().get(IMAGERY_NOT_YET, []) != words:
        manifest.update(**{IMAGERY_NOT_YET: words})


def _asked(order: Order, inputs: Sequence[str]) -> list[str]:
    """Return the words of the command line that ask for the same image again, with options that are not the default."""
    words = [word for source in inputs for word in ("--imagery", source)]
    if order.gsd is not None:
        words += ["--gsd", f"{order.gsd:g}"]
    usual, settings = type(order.settings)(), order.settings
    if settings.bands is not None:
        words += ["--bands", ",".join(map(str, settings.bands))]
    if settings.nodata is not None:
        words += ["--nodata", str(settings.nodata)]
    if settings.stac_dates is not None:
        words += ["--dates", str(settings.stac_dates)]
    for name in ("xyz_zoom", "xyz_placeholders", "stac_clouds", "stac_mosaic", "stac_items"):
        if (value := getattr(settings, name)) != getattr(usual, name):
            words += ["--set", f"{name}={str(value).lower()}"]
    return words


def _sweep(folder: Path) -> None:
    """Remove the files that a killed run left half written among the parts of an image; the city's lock is held."""
    for inside, _, names in os.walk(folder):
        for name in names:
            if _HALF_DONE.match(name):
                Path(inside, name).unlink(missing_ok=True)


def with_recorded_imagery(order: Order, place: Place) -> Order:
    """Return the order with the imagery's sources of last time, where none is named: the place has changed, or all is
    made anew (``force``).

    Only the user's own rasters are taken, as far as they are still there and meet the new place: nothing is downloaded
    that nobody asked for. Raises :class:`NoFileError` where all is to be made anew and one is gone.
    """
    step = order.files.manifest.step(f"fetch:{order.image_part}")
    same = step.get("place", ground(place)) == ground(place)
    if order.imagery or not order.image.exists() or (same and not order.force):
        return order
    if not (sources := _recorded_rasters(order)):
        return order
    chosen = step.get("chosen")
    before = {"nodata": step.get("nodata"), "bands": None if chosen is None else tuple(chosen)}
    asked = {name: value for name, value in before.items() if getattr(order.settings, name) is None}
    again = replace(order, imagery=sources, settings=order.settings.model_copy(update=asked))
    try:
        prepare(again, place, dry_run=True)
    except MissingError as error:
        if not order.force:
            return order  # what is there is kept, and that it does not fit is said
        raise _gone(order, error) from None
    except SourceError:
        if same:  # damaged since
            raise
        return order  # of other ground
    return again


def check_recorded(order: Order) -> None:
    """Raise :class:`NoFileError`, before anybody is asked, where all is to be made anew and a raster of it is gone."""
    if order.imagery or not order.force or not order.image.exists():
        return
    from rsosm_cli.imagery.sources import raster_paths

    try:
        for source in _recorded_rasters(order):
            raster_paths(source)
    except MissingError as error:
        raise _gone(order, error) from None


def _recorded_rasters(order: Order) -> tuple[str, ...]:
    """Return the user's own rasters that the image was made of; none where it was made of anything else, too."""
    sources = tuple(order.files.manifest.step(f"fetch:{order.image_part}").get("inputs", []))
    return sources if all(os.path.isabs(s) and not s.startswith("/vsi") for s in sources) else ()


def _gone(order: Order, error: MissingError) -> NoFileError:
    return NoFileError(
        f"The imagery of {order.city} was made of what is not there any more: {error.message}",
        hint="Bring it back, or name what to make it of: --imagery SOURCE",
    )


def _kept(order: Order, place: Place) -> list[str]:
    """Return what is said of an image that stays as it is."""
    notes = [fault.note for fault in faults(order.files, place, order.epoch)] or ["The imagery that is there is kept."]
    return [*notes, *_not_yet(order)]


def _not_yet(order: Order) -> list[str]:
    """Return a sentence on imagery that was asked for and never came, where none is named now."""
    asked = order.files.manifest.read().get(IMAGERY_NOT_YET, [])
    return [_GO_ON.format(shlex.join(asked))] if asked else []


def _recorded(source: str) -> str:
    """Return a source as the record has it: without keys, and of files the absolute path."""
    return display(source) if _remote(source) else os.path.abspath(Path(source).expanduser())


def _remote(source: str) -> bool:
    return "://" in source or source.startswith("/vsi") or is_tile_service(source)


def check_rasters(order: Order, place: Place) -> None:
    """Say what cannot work of rasters, behind addresses too, before the OSM source, which may be large, is read."""
    if order.imagery and not any(s.startswith("stac:") or is_tile_service(s) for s in order.imagery):
        prepare(order, place, dry_run=True)


def prepare(order: Order, place: Place, *, dry_run: bool) -> ImageryInfo:
    from rsosm_cli.imagery.prepare import prepare_imagery  # GDAL only where imagery is asked for

    if order.offline:
        # The tiles of a template can be counted without asking for one; anything else is looked at to be planned.
        asked = [s for s in order.imagery if _remote(s) and (not dry_run or is_described(s) or not is_tile_service(s))]
        if asked:
            raise UsageError(
                f"The imagery {display(asked[0])} is on the network, and --offline forbids it.",
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


def plan_imagery(order: Order, place: Place, place_key: str, numbers: dict[str, Any]) -> list[str]:
    """Return sentences on what would be read or downloaded, its size put into ``numbers``."""
    if not order.imagery:
        if order.image.exists():
            return _kept(order, place)
        return [HOW_TO_ADD_IMAGERY]
    there = order.files.manifest.finished(f"fetch:{order.image_part}", order.imagery_key(place_key))
    if there and not order.force and _readable(order, place):
        return ["The imagery is there and unchanged."]
    info = prepare(order, place, dry_run=True)
    numbers["imagery_mb"] = round(info.size_bytes / 1e6, 3)
    return list(info.notes)
