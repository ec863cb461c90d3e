"""Tile services that describe themselves: WMTS (``wmts:ADDRESS#LAYER``) and TMS (``tms:ADDRESS``).

WMTS: OGC 07-057r7, GetCapabilities in XML; tiles by the layer's ``ResourceURL`` (RESTful) or by ``GetTile`` (KVP). TMS:
OSGeo's Tile Map Service 1.0.0, ``tilemapresource.xml``, rows counted from the south; or a template with ``{y}``. Both
become the template of an XYZ service, so only tilings of EPSG:3857 that have its origin and its zooms can be taken.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

from rsosm_cli.address import HIDDEN, display
from rsosm_cli.client import Client
from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.imagery.service import (
    PLACES,
    PREFIXED,
    TileService,
    filled,
    from_environment,
    is_described,
    tile_service,
)
from rsosm_cli.settings import FetchSettings

_WORLD_M = 2 * math.pi * 6378137.0
_PIXEL_M = 0.00028  # the rendering pixel of OGC's scale denominators
_MERCATOR = re.compile(r"(^|[:/])(3857|900913|102100|102113)$")
_KEPT_S = 30 * 86_400.0  # descriptions change with the years


def find_service(
    source: str, settings: FetchSettings, environment: Mapping[str, str] = os.environ, client: Client | None = None
) -> TileService | None:
    """Return the tile service that a source names, its description asked for where it has one; None: it names none.

    Raises :class:`UsageError` (no such layer, no tiling of EPSG:3857, a key is missing), :class:`SourceError`.
    """
    match = PREFIXED.match(source)
    if match is None:
        return tile_service(source, environment)
    kind, address = match[1], match[2]
    if not is_described(source):  # the template of a TMS
        return tile_service(address.replace("{y}", "{-y}"), environment)
    secrets = {n: from_environment(n, display(source), environment) for n in PLACES.findall(address)}
    url, _, layer = filled(address, secrets).partition("#")
    if kind == "wmts" and not urlsplit(url).query and not url.lower().endswith(".xml"):
        url += "?" + urlencode({"SERVICE": "WMTS", "REQUEST": "GetCapabilities", "VERSION": "1.0.0"})
    client = client or Client(
        f"The {kind.upper()} service", settings.contact, settings.max_wait_s, hint="Check the address, or try later."
    )
    file = client.fetch(url, {}, post=False, check=_is_xml, suffix=".xml", max_age_s=_KEPT_S)
    root = ElementTree.parse(file).getroot()
    service = _wmts(root, url, layer) if kind == "wmts" else _tms(root, url)
    shown = service.template
    for value in secrets.values():
        shown = shown.replace(value, HIDDEN)
    return TileService(**{**vars(service), "shown": display(shown)})


def _is_xml(file: Path) -> str:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError:
        page = b"<html" in file.read_bytes()[:2000].lower()
        return "an HTML page instead of its description" if page else "its description is not XML"
    name = _name(root)
    if name not in ("Capabilities", "TileMap"):
        said = " ".join("".join(root.itertext()).split())[:100]
        return f"its description is a {name}: {said}" if said else f"its description is a {name}"
    return ""


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _all(element: ElementTree.Element, *path: str) -> list[ElementTree.Element]:
    """Return the descendants along a path of local names: namespaces differ from server to server."""
    found = [element]
    for part in path:
        found = [child for parent in found for child in parent if _name(child) == part]
    return found


def _text(element: ElementTree.Element, *path: str) -> str:
    found = _all(element, *path)
    return (found[0].text or "").strip() if found else ""


def _wmts(root: ElementTree.Element, url: str, wanted: str) -> TileService:
    host = urlsplit(url).hostname or "WMTS"
    layers = {_text(layer, "Identifier"): layer for layer in _all(root, "Contents", "Layer")}
    if not layers:
        raise SourceError(f"The WMTS service at {host} has no layers.", hint="Check the address.")
    if wanted not in layers:
        listed = ", ".join(list(layers)[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        raise UsageError(
            f"The WMTS service at {host} has no layer {wanted!r}." if wanted else f"No layer of {host} is named.",
            hint=f"Add one to the address, as in #{next(iter(layers))}. It has {listed}.",
            layers=list(layers),
        )
    layer = layers[wanted]
    linked = [_text(link, "TileMatrixSet") for link in _all(layer, "TileMatrixSetLink")]
    sets = {_text(s, "Identifier"): s for s in _all(root, "Contents", "TileMatrixSet")}
    for name in linked:
        zooms = _zooms(sets[name], host) if name in sets else {}
        if zooms:
            break
    else:
        raise UsageError(
            f"The layer {wanted} of {host} has no tiling of EPSG:3857 with the zooms of XYZ services.",
            hint=f"It has {', '.join(linked) or 'none at all'}. Download the image from the provider instead.",
        )
    styles = _all(layer, "Style")
    default = [s for s in styles if s.get("isDefault") == "true"] or styles
    dimensions = {_text(d, "Identifier").lower(): _text(d, "Default") for d in _all(layer, "Dimension")}
    values = {name: value for name, value in dimensions.items() if value}
    values |= {"style": _text(default[0], "Identifier") if default else "default", "tilematrixset": name}
    title = _text(root, "ServiceIdentification", "Title") or host
    provider = _text(root, "ServiceProvider", "ProviderName")
    terms = [_text(root, "ServiceIdentification", part) for part in ("AccessConstraints", "Fees")]
    said = "; ".join(dict.fromkeys(t for t in terms if t and t.lower() != "none"))
    return TileService(
        template=_checked(_template(root, layer, wanted, values, url), host),
        shown="",
        name=f"{title}, {wanted}",
        attribution=", ".join(part for part in (provider, said) if part) or f"unknown: see the terms of use of {host}",
        min_zoom=min(zooms),
        max_zoom=min(24, max(zooms)),
        zoom_names=zooms,
    )


def _positive(text: str, what: str, host: str) -> float:
    """Return a number of a description. Raises :class:`SourceError` where it is none, or none that can be."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-9 < value < 1e15:  # beyond them it is no length in metres, and logarithms of it end
        raise _wrong(host, f"the {what} {text[:40]!r}")
    return value


def _wrong(host: str, what: str) -> SourceError:
    return SourceError(
        f"The description of the tile service at {host} has {what}, with which no tile can be asked for.",
        hint="Tell its provider; if you know the address of its tiles, give it: https://host/{z}/{x}/{y}.png",
    )


def _checked(template: str, host: str) -> str:
    """Return the address of tiles if it says which tile and nothing else is open in it."""
    places = re.findall(r"\{([^{}]*)\}", template)
    if unknown := [place for place in places if place not in ("x", "y", "-y", "z")]:
        raise _wrong(host, f"addresses with the place {{{unknown[0]}}} and no value for it")
    if not {"x", "z"} <= set(places) or not {"y", "-y"} & set(places):
        raise _wrong(host, f"the address {display(template)[:120]!r} without column, row and zoom")
    return template


def _zooms(matrices: ElementTree.Element, host: str) -> dict[int, str]:
    """Return the name of every zoom of a tile matrix set, nothing where it is not a tiling of XYZ services."""
    if _MERCATOR.search(_text(matrices, "SupportedCRS")) is None:
        return {}
    found = {}
    for matrix in _all(matrices, "TileMatrix"):
        scale = _positive(_text(matrix, "ScaleDenominator"), "ScaleDenominator", host) * _PIXEL_M
        width, height = (_positive(_text(matrix, side), side, host) for side in ("TileWidth", "TileHeight"))
        corner_text = _text(matrix, "TopLeftCorner")
        try:
            left, top = (float(v) for v in corner_text.split())
        except ValueError:
            raise _wrong(host, f"the TopLeftCorner {corner_text[:40]!r}") from None
        zoom = math.log2(_WORLD_M / (scale * width))
        # Off by less than a thousandth of a zoom: rounded constants; the corner within ten metres likewise.
        corner = math.isclose(left, -_WORLD_M / 2, abs_tol=10) and math.isclose(top, _WORLD_M / 2, abs_tol=10)
        if width == height and corner and abs(zoom - round(zoom)) < 1e-3 and 0 <= round(zoom) <= 24:
            found[round(zoom)] = _text(matrix, "Identifier")
    return found


def _template(
    root: ElementTree.Element, layer: ElementTree.Element, name: str, values: Mapping[str, str], url: str
) -> str:
    """Return the address of a tile: the layer's own (RESTful), else that of the operation GetTile (KVP)."""
    formats = [f.text or "" for f in _all(layer, "Format")]
    usable = [f for f in formats if f in ("image/jpeg", "image/png", "image/webp")] or formats
    places = {**values, "tilematrix": "{z}", "tilerow": "{y}", "tilecol": "{x}", "layer": name}
    tiles = [r for r in _all(layer, "ResourceURL") if r.get("resourceType") == "tile"]
    tiles.sort(key=lambda r: usable.index(r.get("format", "")) if r.get("format", "") in usable else len(usable))
    if tiles:
        return re.sub(r"\{(\w+)\}", lambda m: places.get(m[1].lower(), m[0]), tiles[0].get("template", ""))
    base = url.partition("?")[0]
    for operation in _all(root, "OperationsMetadata", "Operation"):
        for get in _all(operation, "DCP", "HTTP", "Get") if operation.get("name") == "GetTile" else []:
            allowed = [v.text for v in get.iter() if _name(v) == "Value"]
            if not allowed or "KVP" in allowed:
                base = next((v for k, v in get.attrib.items() if k.endswith("href")), base)
    asked = {"SERVICE": "WMTS", "REQUEST": "GetTile", "VERSION": "1.0.0", "LAYER": name}
    asked |= {"STYLE": values["style"], "FORMAT": usable[0] if usable else "image/png"}
    asked |= {"TILEMATRIXSET": values["tilematrixset"]}
    asked |= {k.upper(): v for k, v in values.items() if k not in ("style", "tilematrixset")}
    given = [part for part in urlsplit(url).query.split("&") if part and not _OURS.match(part)]  # a key, for instance
    query = "&".join([*given, urlencode(asked), "TILEMATRIX={z}", "TILEROW={y}", "TILECOL={x}"])
    base = base.rstrip("?&")
    return f"{base}{'&' if '?' in base else '?'}{query}"


_OURS = re.compile(r"(service|request|version)=", re.IGNORECASE)


def _tms(root: ElementTree.Element, url: str) -> TileService:
    host = urlsplit(url).hostname or "TMS"
    if _MERCATOR.search(_text(root, "SRS")) is None:
        raise UsageError(
            f"The tiles of {host} are in {_text(root, 'SRS') or 'an unknown CRS'}, not in EPSG:3857.",
            hint="Download the image from the provider instead.",
        )
    formats = _all(root, "TileFormat")
    side = _positive(formats[0].get("width", "256"), "width", host) if formats else 256.0
    ending = formats[0].get("extension", "png") if formats else "png"
    names = {}
    bases = set()
    for tiles in _all(root, "TileSets", "TileSet"):
        zoom = math.log2(_WORLD_M / (_positive(tiles.get("units-per-pixel", ""), "units-per-pixel", host) * side))
        base, _, name = tiles.get("href", "").rstrip("/").rpartition("/")
        if not name:
            raise _wrong(host, "a zoom without an address")
        if abs(zoom - round(zoom)) < 1e-3 and 0 <= round(zoom) <= 24:
            names[round(zoom)] = name
            bases.add(base)
    if not names or len(bases) > 1:
        raise UsageError(
            f"The tiles of {host} do not have the zooms of XYZ services.",
            hint="Give a template with the rows counted from the south: https://host/{z}/{x}/{-y}.png",
        )
    base = bases.pop()
    if "://" not in base:  # beside the description
        base = "/".join(part for part in (url.rpartition("/")[0], base) if part)
    return TileService(
        template=_checked(f"{base}/{{z}}/{{x}}/{{-y}}.{ending}", host),
        shown="",
        name=_text(root, "Title") or host,
        attribution=_text(root, "Attribution", "Title") or f"unknown: see the terms of use of {host}",
        min_zoom=min(names),
        max_zoom=max(names),
        zoom_names=names,
    )
