"""Which images of a STAC API lie over a place, the least cloudy first.

Asked with pystac-client, over the polite client of ours (bounded waits, kept answers).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.address import host_of
from rsosm_cli.client import Client
from rsosm_cli.errors import MissingError, RsosmError, SourceError
from rsosm_cli.settings import FetchSettings

if TYPE_CHECKING:
    import pystac
    from shapely import Geometry

_SOURCE = re.compile(r"stac:(https?://[^#]+)#(.+)")
_KEPT_S = 7 * 86_400.0  # a search: so that a run that goes on sees the same images
_PAGE = 100
# Images that are looked through where an API does not sort them: thirty requests, and ten years of Sentinel-2 over a
# place on two orbits have some 1,500.
_LOOKED_AT = 3000
_CLOUDS = "eo:cloud_cover"


@dataclass(frozen=True)
class Found:
    """Images over a place, the least cloudy first; the collection's credit; notes on images that were not looked at.

    ``more``: the note that clear images were left out, for where all of these are used.
    """

    items: list[pystac.Item]
    credit: dict[str, str]
    notes: list[str]
    more: list[str]


def search(source: str, place: Geometry, settings: FetchSettings, *, client: Client | None = None) -> Found:
    """Return the images of a collection over ``place`` (WGS 84): of those clear enough, the ``stac_items`` clearest.

    An API that can is asked for clear ones alone, and for the clearest first; of another, up to 3,000 images are looked
    through. Raises :class:`MissingError` (no such collection, no image), :class:`SourceError`, :class:`UsageError`.
    """
    import pystac
    import pystac_client
    from pystac_client.errors import ClientTypeError
    from pystac_client.exceptions import APIError

    match = _SOURCE.fullmatch(source)
    assert match is not None
    url, name = match[1].rstrip("/"), match[2]
    client = client or Client("The STAC API", settings.contact, settings.max_wait_s, otherwise="")
    try:
        api = pystac_client.Client.open(url, stac_io=_polite_io(client))
        collection = api.get_collection(name)
        if collection is None:
            raise MissingError(f"{host_of(url)} has no collection {name}.", hint="Check its name.")
        seen = _looked_through(api, name, place, settings, _clear_alone(api, settings.stac_clouds))
        if not seen.clear:  # none is clear; or they do not say how cloudy they are, and a limit leaves them all out
            seen = _looked_through(api, name, place, settings, {})
    except RsosmError:
        raise
    except (
        pystac.STACError,
        APIError,
        ClientTypeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # any other JSON
        kind = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise SourceError(
            f"The STAC API at {host_of(url)} does not answer as one ({re.sub(r'https?://[^ ]+', '...', kind)}).",
            hint="Check the address: the root of an API with search, not a static catalogue.",
        ) from None
    if not seen.clear:
        when = f" in {settings.stac_dates}" if settings.stac_dates else ""
        least = f"; the least cloudy has {seen.least:.0f} %" if seen.near else ""
        raise MissingError(
            f"{name} has no image of the place{when} with at most {settings.stac_clouds:g} % of clouds{least}.",
            hint="Widen --dates, or raise --set stac_clouds=...",
        )
    providers = ", ".join(p.name for p in collection.providers or [])
    licence = collection.license or "unknown"
    title = collection.title or name
    credit = {"name": title, "licence": licence, "attribution": providers or host_of(url)}
    ordered = sorted(seen.clear, key=lambda i: (clouds(i), i.id))
    notes, more = [], []
    if seen.cut:
        notes.append(
            f"{title} has more than {_LOOKED_AT:,} images of the place, and its API does not sort them by their "
            "clouds: later ones were not looked at. Narrow --dates."
        )
    if seen.more or len(ordered) > settings.stac_items:
        more.append(
            f"{title} has more images of the place than the {settings.stac_items} least cloudy ones that are taken: "
            "--set stac_items=... takes more, --dates chooses others."
        )
    return Found(ordered[: settings.stac_items], credit, notes, more)


@dataclass
class _Seen:
    """What was met in the answers of a search: images over the place, and those of them that are clear enough."""

    clear: list[pystac.Item]
    near: bool = False
    least: float = 100.0
    more: bool = False  # enough were found in a sorted answer, and there are more
    cut: bool = False  # it went on beyond what is looked at


def _looked_through(api: Any, name: str, place: Geometry, settings: FetchSettings, limits: dict[str, Any]) -> _Seen:
    import shapely
    from pystac_client.conformance import ConformanceClasses

    ordered = bool(api.conforms_to(ConformanceClasses.SORT))
    if ordered:
        limits = {**limits, "sortby": [{"field": f"properties.{_CLOUDS}", "direction": "asc"}]}
    found = api.search(
        method="GET", collections=[name], bbox=list(place.bounds), datetime=settings.stac_dates, limit=_PAGE, **limits
    )  # fmt: skip
    seen, last = _Seen([]), 0.0
    for number, item in enumerate(found.items()):
        if number >= _LOOKED_AT:
            seen.cut = True
            break
        # Images that do not tell their clouds are sorted first or last: they say nothing of the order.
        cover = clouds(item)
        ordered = ordered and (cover >= last or item.properties.get(_CLOUDS) is None)
        last = max(last, cover)
        if item.geometry is None or not shapely.intersects(shapely.from_geojson(json.dumps(item.geometry)), place):
            continue
        seen.near = True
        seen.least = min(seen.least, cover)
        if cover <= settings.stac_clouds:
            if ordered and len(seen.clear) >= settings.stac_items:
                seen.more = True
                break
            seen.clear.append(item)
        elif ordered:
            break  # all later ones are as cloudy
    return seen


def _clear_alone(api: Any, most: float) -> dict[str, Any]:
    """Return how an API is asked for images below a limit of clouds; nothing where it does not say that it can be."""
    from pystac_client.conformance import ConformanceClasses

    if api.conforms_to(ConformanceClasses.QUERY):
        return {"query": {_CLOUDS: {"lte": most}}}
    if api.conforms_to(ConformanceClasses.FILTER):
        return {"filter": f"{_CLOUDS} <= {most:g}", "filter_lang": "cql2-text"}
    return {}


def clouds(item: pystac.Item) -> float:
    value = item.properties.get(_CLOUDS)
    return float(value) if value is not None else 0.0


def _polite_io(client: Client) -> Any:
    from pystac_client.stac_api_io import StacApiIO

    class PoliteIO(StacApiIO):
        def request(
            self,
            href: str,
            method: str | None = None,
            headers: dict[str, str] | None = None,
            parameters: dict[str, Any] | None = None,
        ) -> str:
            form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (parameters or {}).items()}
            answer = client.fetch(href, form, post=False, check=_check_json, suffix=".json", max_age_s=_KEPT_S)
            return answer.read_text(encoding="utf-8")

    return PoliteIO()


def _check_json(file: Path) -> str:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        page = b"<html" in file.read_bytes()[:2000].lower()
        return "an HTML page instead of JSON" if page else "the answer is not JSON"
    return "" if isinstance(answer, dict) else "the answer is not a STAC document"
