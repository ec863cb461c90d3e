"""A boundary by name or id from Nominatim, the public search server of OSM."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsosm_cli.client import Client
from rsosm_cli.errors import MissingError, SourceError
from rsosm_cli.geometry import area_km2
from rsosm_cli.places.extract import names_of, normal
from rsosm_cli.places.place import TINY_KM2, Place
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import DAY_S, utc

_OTHER_WAYS = "Give --boundary FILE, --bbox WEST SOUTH EAST NORTH, or an extract: --osm FILE.osm.pbf"


def search_place(
    name: str, settings: FetchSettings, *, offline: bool = False, fresh: bool = False, client: Client | None = None
) -> Place:
    """Return the first surface that Nominatim finds for ``name``; points and tiny polygons are not taken.

    Raises :class:`MissingError` (nothing found, or only points), :class:`SourceError` (no answer).
    """
    data = {"q": name, "limit": "10", "dedupe": "0"}
    return _first(name, *_ask(name, "search", data, settings, offline, fresh, client))


def lookup_place(
    name: str,
    osm_id: str,
    settings: FetchSettings,
    *,
    offline: bool = False,
    fresh: bool = False,
    called: bool = False,
    client: Client | None = None,
) -> Place | None:
    """Return the boundary of one OSM relation or way (``R1155955``) by Nominatim.

    With ``called``, ``None`` where it does not bear the name. Raises :class:`MissingError`, :class:`SourceError`.
    """
    form = {"osm_ids": osm_id, "namedetails": "1"}
    answers, asked = _ask(name, "lookup", form, settings, offline, fresh, client)
    if called and not any(_bears(answer, name) for answer in answers):
        return None
    if not answers:
        raise MissingError(f"Nominatim does not know {osm_id}.", hint=_OTHER_WAYS, osm_id=osm_id)
    return _first(name, answers, asked)


def _bears(answer: dict[str, Any], name: str) -> bool:
    tags = {str(k): str(v) for k, v in (answer.get("namedetails") or {}).items()}
    return normal(name) in names_of(tags)


def _ask(
    name: str, call: str, data: dict[str, str], settings: FetchSettings, offline: bool, fresh: bool,
    client: Client | None,
) -> tuple[list[dict[str, Any]], float]:  # fmt: skip
    """Return the answers, and when they were given: kept ones are believed for some days, unless there were none.

    What the server did not have, it may have a minute later: a place just mapped, or its search was being rebuilt.
    """
    if offline:
        raise SourceError(f"The boundary of {name} needs Nominatim, and --offline forbids it.", hint=_OTHER_WAYS)
    client = client or Client(
        "Nominatim", contact=settings.contact, max_wait_s=settings.max_wait_s, otherwise=_OTHER_WAYS
    )
    url = f"{settings.nominatim_url.rstrip('/')}/{call}"
    form = {"format": "jsonv2", "polygon_geojson": "1", "extratags": "1", "addressdetails": "1", **data}
    days = settings.nominatim_days if settings.max_age_days is None else settings.max_age_days
    fresh = fresh or _is_empty(client.cached(url, form))
    answer = client.fetch(url, form, post=False, check=_check, fresh=fresh, max_age_s=days * DAY_S)
    return list(json.loads(answer.read_text(encoding="utf-8"))), answer.stat().st_mtime


def _is_empty(kept: Path) -> bool:
    try:
        return kept.read_bytes().strip() == b"[]"
    except FileNotFoundError:
        return False


def _check(file: Path) -> str:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return "the answer is not JSON"
    if not isinstance(answer, list):
        return f"the answer is not a list of places: {str(answer)[:100]}"
    return ""


def _first(name: str, answers: list[dict[str, Any]], asked: float) -> Place:
    import shapely

    refused = []
    for answer in answers:
        label = str(answer.get("display_name") or name)
        shape = answer.get("geojson") or {}
        if shape.get("type") not in ("Polygon", "MultiPolygon"):
            refused.append(f"{label} (a {str(shape.get('type') or 'point').lower()})")
            continue
        try:
            geometry = shapely.from_geojson(json.dumps(shape))
        except shapely.errors.GEOSException:
            refused.append(f"{label} (a damaged polygon)")
            continue
        if area_km2(geometry) < TINY_KM2:
            refused.append(f"{label} ({area_km2(geometry) * 1e6:,.0f} m²)")
            continue
        return _place(name, label, answer, geometry, len(answers) - 1, asked)
    if refused:
        raise MissingError(
            f"Nominatim knows {name} only without a boundary: {'; '.join(refused[:3])}.", hint=_OTHER_WAYS, name=name
        )
    raise MissingError(
        f"Nominatim knows no place called {name!r}.", hint=f"Check the spelling. {_OTHER_WAYS}", name=name
    )


def _place(name: str, label: str, answer: dict[str, Any], geometry: Any, others: int, asked: float) -> Place:
    osm_id = f"{str(answer.get('osm_type', ''))[:1].upper()}{answer.get('osm_id', '')}"
    level = str((answer.get("extratags") or {}).get("admin_level") or "")
    place = Place(
        name=name,
        geometry=geometry,
        source="Nominatim",
        osm_id=osm_id,
        admin_level=int(level) if level.isdecimal() else None,
        country=str((answer.get("address") or {}).get("country_code") or "").upper(),
        asked=asked,
    )
    notes = [place.sentence(label)]
    if others > 0:
        notes.append(f"{others} more of Nominatim's answers are called so; --osm-id chooses.")
    if time.time() - asked > DAY_S:
        notes.append(f"Nominatim was asked for it at {utc(asked)}; --max-age 0 asks again.")
    return replace(place, notes=tuple(notes))
