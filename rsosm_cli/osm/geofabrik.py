"""The extract of OSM that covers a place, from the index of a public server, kept under the root for other cities.

The index is Geofabrik's (``index-v1.json``): a GeoJSON of features with ``id``, ``parent``, ``name`` and ``urls.pbf``;
beside each extract lies its checksum, ``<url>.md5``.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from rsosm_cli.address import display
from rsosm_cli.client import Client
from rsosm_cli.errors import MissingError, SourceError
from rsosm_cli.osm.download import ask_size, download_file, md5_of
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.units import size
from rsosm_cli.workspace import DAY_S, fingerprint, locked, slug, utc, write_json

if TYPE_CHECKING:
    from shapely import Geometry

log = logging.getLogger("rsosm")

_INDEX_DAYS = 30.0  # regions change a few times a year
OTHER_WAYS = "Give an extract that you have: --osm FILE.osm.pbf"


@dataclass(frozen=True)
class Region:
    """An extract of the index. ``area_km2``: of its outline."""

    id: str
    name: str
    url: str
    area_km2: float


@dataclass(frozen=True)
class Extract:
    """An extract on this disk. ``md5``: its checksum; ``asked``: when the server was last asked, seconds since 1970."""

    region: Region
    path: Path
    size: int
    md5: str
    asked: float

    def as_dict(self) -> dict[str, Any]:
        """Return what the manifest records."""
        url = display(self.region.url)
        return {"id": self.region.id, "url": url, "bytes": self.size, "md5": self.md5, "asked": utc(self.asked)}


def client_of(settings: FetchSettings) -> Client:
    return Client("The server of extracts", settings.contact, settings.max_wait_s, otherwise=OTHER_WAYS)


def find_region(
    name: str, place: Geometry, settings: FetchSettings, *, offline: bool = False, client: Client | None = None
) -> Region:
    """Return the smallest extract of the index that covers ``place`` (WGS 84).

    Raises :class:`MissingError` where none does, :class:`SourceError` where the index cannot be had.
    """
    regions = covering(_index(settings, offline, client or client_of(settings)), place)
    if not regions:
        raise MissingError(f"No extract of {display(settings.extracts_url)} covers {name}.", hint=OTHER_WAYS)
    return regions[0]


def covering(features: Sequence[dict[str, Any]], place: Geometry) -> list[Region]:
    """Return the regions of an index that cover ``place``, the smallest first."""
    import shapely

    from rsosm_cli.geometry import area_km2

    box = shapely.box(*place.bounds)
    shapely.prepare(place)
    found = []
    for feature in features:
        facts = feature.get("properties") or {}
        url = (facts.get("urls") or {}).get("pbf")
        if not url or not feature.get("geometry"):
            continue
        outline = shapely.from_geojson(json.dumps(feature["geometry"]))
        if not shapely.intersects(shapely.box(*outline.bounds), box):
            continue
        # Outlines are drawn by hand and may cross themselves.
        outline = outline if outline.is_valid else shapely.make_valid(outline)
        if shapely.covers(outline, place):
            label = str(facts.get("name") or facts.get("id"))
            found.append(Region(str(facts.get("id") or label), label, str(url), area_km2(_surface(outline))))
    return sorted(found, key=lambda region: (region.area_km2, region.id))


def _surface(outline: Geometry) -> Geometry:
    import shapely

    parts = shapely.get_parts(outline)
    return shapely.multipolygons([p for p in shapely.get_parts(parts) if p.geom_type == "Polygon"])


def _index(settings: FetchSettings, offline: bool, client: Client) -> list[dict[str, Any]]:
    url = settings.extracts_url
    age = _INDEX_DAYS * DAY_S
    if offline:
        kept = client.cached(url, {}, ".json")
        if not kept.is_file():
            raise SourceError("The index of extracts is on the network, and --offline forbids it.", hint=OTHER_WAYS)
        answer = kept
    else:
        answer = client.fetch(url, {}, post=False, check=_check_index, suffix=".json", max_age_s=age)
    return list(json.loads(answer.read_text(encoding="utf-8"))["features"])


def _check_index(file: Path) -> str:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return "the index of extracts is not JSON"
    if not isinstance(answer, dict) or not isinstance(answer.get("features"), list):
        return "the index of extracts is no collection of features"
    return ""


def kept_extract(region: Region, folder: Path) -> Extract | None:
    """Return the extract of ``region`` in ``folder``, ``None`` where there is none."""
    path, note = _paths(region, folder)
    if not path.is_file() or not note.is_file():
        return None
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))
        extract = Extract(region, path, int(facts["bytes"]), str(facts["md5"]), float(facts["asked_s"]))
    except (ValueError, KeyError, TypeError):
        return None
    return extract if path.stat().st_size == extract.size and facts.get("address") == _address(region) else None


def is_old(asked: float, max_age_days: float | None) -> bool:
    return max_age_days is not None and time.time() - asked > max_age_days * DAY_S


def size_of(region: Region, settings: FetchSettings, client: Client | None = None) -> int:
    """Return the bytes of a region's extract by asking its server, 0 where it does not say."""
    return ask_size(client or client_of(settings), region.url).size


def get_extract(
    region: Region,
    folder: Path,
    settings: FetchSettings,
    *,
    offline: bool = False,
    fresh: bool = False,
    progress: Progress = SILENT,
    client: Client | None = None,
) -> Extract:
    """Return the extract of ``region``, downloaded where it is not in ``folder`` or too old; the size is said first.

    ``fresh`` asks the server whatever the age; what has not changed there is not downloaded again. Two processes that
    want one extract make one download. Raises :class:`SourceError`, :class:`DiskError`.
    """
    client = client or client_of(settings)
    path, note = _paths(region, folder)
    with locked(folder, f"{path.name}.lock"):  # the second process waits, and finds the extract there
        kept = kept_extract(region, folder)
        if kept is not None and (offline or not (fresh or is_old(kept.asked, settings.max_age_days))):
            log.info("The extract %s is there (%s).", region.name, size(kept.size))
            return kept
        if offline:
            raise SourceError(
                f"The extract {region.name} is on the network, and --offline forbids it.", hint=OTHER_WAYS
            )
        remote = replace(ask_size(client, region.url), md5=_checksum(region, client))
        # Without its note, a file may be what a run downloaded that was killed before it could write one.
        if path.is_file() and path.stat().st_size == remote.size and md5_of(path) == remote.md5:
            log.info("The extract %s has not changed since it was downloaded.", region.name)
        else:
            large = size(remote.size) if remote.size else "of unknown size"
            log.info("Downloading the extract %s, %s, from %s.", region.name, large, display(region.url))
            download_file(client, remote, path, progress=progress)
        extract = Extract(region, path, path.stat().st_size, remote.md5, time.time())
        write_json(note, {**extract.as_dict(), "address": _address(region), "asked_s": extract.asked})
        return extract


def _paths(region: Region, folder: Path) -> tuple[Path, Path]:
    name = slug(region.id)
    return folder / f"{name}.osm.pbf", folder / f"{name}.json"


def _address(region: Region) -> str:
    """Return what tells an address from others in a note that anybody may read: it may hold a key."""
    return fingerprint(region.url)


def _checksum(region: Region, client: Client) -> str:
    """Return the MD5 that the server tells of an extract."""
    parts = urlsplit(region.url)
    url = urlunsplit(parts._replace(path=f"{parts.path}.md5"))  # before a query, which may be a signature
    answer = client.fetch(url, {}, post=False, check=_check_md5, fresh=True, suffix=".md5")
    return answer.read_text(encoding="utf-8").split()[0].lower()


def _check_md5(file: Path) -> str:
    text = file.read_bytes()[:200].decode(errors="replace")
    return "" if re.match(r"[0-9a-fA-F]{32}(\s|$)", text) else "the answer is not a checksum"
