"""City name (or id, file, box) to boundary: which of the ways is asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rsosm_cli.errors import MissingError, SourceError, UsageError
from rsosm_cli.places.extract import listed_place, place_by_id, place_by_name, place_by_way
from rsosm_cli.places.given import place_of_box, place_of_extract, place_of_file
from rsosm_cli.places.nominatim import lookup_place, search_place
from rsosm_cli.places.place import Place, checked
from rsosm_cli.places.table import known_id
from rsosm_cli.settings import FetchSettings

log = logging.getLogger("rsosm")


def find_place(
    city: str,
    *,
    files: Sequence[Path] = (),
    boundary: str | None = None,
    bbox: Sequence[float] | None = None,
    osm_id: str | None = None,
    settings: FetchSettings,
    offline: bool = False,
    fresh: bool = False,
) -> Place:
    """Return the ground called ``city``; ``files`` are the sources of ``--osm``.

    ``boundary`` (a vector file, ``extract`` or ``nominatim``), ``bbox`` and ``osm_id`` exclude one another. Without
    them the name is looked up in the administrative relations of the OSM files, and at Nominatim where no OSM file is
    given; for a city of the table, the relation listed there is taken where it bears the name. ``fresh``: kept answers
    of Nominatim are asked for again. Raises
    :class:`UsageError`, :class:`MissingError`, :class:`SourceError`, :class:`FormatError`.
    """
    from rsosm_cli.osm.extract import is_osm_file

    given = [n for n, v in (("--boundary", boundary), ("--bbox", bbox), ("--osm-id", osm_id)) if v is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say where {city} is.", hint="Give one of them.")
    extracts = [f for f in files if is_osm_file(f)]
    if bbox is not None:
        return place_of_box(city, bbox)
    if boundary == "extract":
        return place_of_extract(city, files)
    if boundary not in (None, "nominatim"):
        return place_of_file(city, Path(boundary))
    if osm_id is not None:
        return checked(_by_id(city, osm_id, extracts, settings, offline, fresh))
    known = known_id(city)
    if extracts and boundary is None:
        listed = listed_place(city, int(known[1:]), extracts) if known else None
        return checked(listed or place_by_name(city, extracts))
    if known is not None:
        place = lookup_place(city, known, settings, offline=offline, fresh=fresh, called=True)
        if place is not None:
            return checked(place)
    return checked(search_place(city, settings, offline=offline, fresh=fresh))


def _by_id(
    city: str, osm_id: str, extracts: Sequence[Path], settings: FetchSettings, offline: bool, fresh: bool
) -> Place:
    match = re.fullmatch(r"\s*(r|w|rel|relation|way)?[/ ]?(-?\d{1,18})\s*", osm_id.lower())
    if match is None:
        raise UsageError(
            f"--osm-id {osm_id!r} is not the id of a relation or way.", hint="For example: --osm-id R1155955"
        )
    kind = "W" if (match.group(1) or "r").startswith("w") else "R"
    number = int(match.group(2))
    if number < 0 and not extracts:
        raise UsageError(
            f"--osm-id {osm_id!r} is an id below zero, which no server knows.", hint="Add its file: --osm FILE"
        )
    if extracts:
        try:
            return (place_by_id if kind == "R" else place_by_way)(city, number, extracts)
        except MissingError as error:
            if offline or number < 0:
                raise
            return _from_nominatim(city, f"{kind}{number}", error, settings, fresh)
    place = lookup_place(city, f"{kind}{number}", settings, offline=offline, fresh=fresh)
    assert place is not None
    return place


def _from_nominatim(city: str, osm_id: str, reason: MissingError, settings: FetchSettings, fresh: bool) -> Place:
    """Return an object that the extracts lack or cut: an id names one and no other, so the public server has the same.

    That it is asked, and why, is said before and in a note.
    """
    log.info("%s Nominatim is asked for it.", reason.message)
    try:
        place = lookup_place(city, osm_id, settings, fresh=fresh)
    except (MissingError, SourceError) as error:
        again = "Try again later. " if isinstance(error, SourceError) else ""
        raise type(error)(f"{reason.message} {error.message}", hint=f"{again}{reason.hint}", osm_id=osm_id) from None
    assert place is not None
    return replace(place, notes=(f"{reason.message} Its boundary is taken from Nominatim.", *place.notes))
