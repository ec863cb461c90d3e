"""Tile services that describe themselves: WMTS (``wmts:ADDRESS#LAYER``) and TMS (``tms:ADDRESS``).

WMTS: OGC 07-057r7, GetCapabilities in XML; tiles by the layer's ``ResourceURL`` (RESTful) or by ``GetTile`` (KVP). TMS:
OSGeo's Tile Map Service 1.0.0, ``tilemapresource.xml``, rows counted from the south; or a template with ``{y}``. Both
become the template of a tile service. Of a WMTS's tilings that of XYZ services is taken where there is one, else one in
any CRS that pyproj knows, a projected one first.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode, urlsplit
from xml.etree import ElementTree

from rsosm_cli.address import display, unfilled
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
from rsosm_cli.imagery.tile_grid import (
    HALF_WORLD_M,
    MERCATOR,
    Matrix,
    TileGrid,
    area_of_use,
    is_geographic,
    known_crs,
    metres_per_unit,
    northing_first,
)
from rsosm_cli.settings import FetchSettings

_PIXEL_M = 0.00028  # the rendering pixel of OGC's scale denominators
_KEPT_S = 30 * 86_400.0  # descriptions change with the years


def find_service(
    source: str, settings: FetchSettings, environment: Mapping[str, str] = os.environ, client: Client | None = None
) -> TileService | None:
    """Return the tile service that a source names, its description asked for where it has one; None: it names none.

    Raises :class:`UsageError` (no such layer, no tiling that can be used, a key is missing), :class:`SourceError`.
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
    client = client or Client(f"The {kind.upper()} service", settings.contact, settings.max_wait_s, otherwise="")
    client = replace(client, secrets=secrets)
    file = client.fetch(url, {}, post=False, check=_is_xml, suffix=".xml", max_age_s=_KEPT_S)
    root = ElementTree.parse(file).getroot()
    host = urlsplit(address).hostname or kind.upper()
    service = _wmts(root, url, layer, host) if kind == "wmts" else _tms(root, url, host)
    return replace(service, unfilled=unfilled(service.template, secrets))  # the description may repeat the keys


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


def _wmts(root: ElementTree.Element, url: str, wanted: str, host: str) -> TileService:
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
    grids = {name: _grid(sets[name], host) for name in linked if name in sets}
    usable = [(name, *found) for name, found in grids.items() if found is not None]
    if not usable:
        crs = [f"{name} ({_text(sets[name], 'SupportedCRS') or 'no CRS'})" for name in linked if name in sets]
        raise UsageError(
            f"The layer {wanted} of {host} has no tiling that can be used: square tiles in a known CRS.",
            hint=f"It has {', '.join(crs) or 'none at all'}. Download the image from the provider instead.",
        )
    # XYZ's own first, for then the tiles are those of other services; degrees last, for their pixels are no squares.
    name, grid, zooms = min(usable, key=lambda u: (bool(u[1].matrices), is_geographic(u[1].crs)))
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
        unfilled="",
        name=f"{title}, {wanted}",
        attribution=", ".join(part for part in (provider, said) if part) or f"unknown: see the terms of use of {host}",
        min_zoom=min(zooms),
        max_zoom=max(zooms),
        zoom_names=zooms,
        grid=grid,
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
        raise _wrong(host, "addresses of tiles without column, row and zoom")
    return template


def _grid(matrices: ElementTree.Element, host: str) -> tuple[TileGrid, dict[int, str]] | None:
    """Return where the tiles of a tile matrix set lie, and the name of every zoom; None: it cannot be used."""
    crs = known_crs(_text(matrices, "SupportedCRS"))
    if crs is None:
        return None
    metres = metres_per_unit(crs)
    found = []
    for matrix in _all(matrices, "TileMatrix"):
        pixel = _positive(_text(matrix, "ScaleDenominator"), "ScaleDenominator", host) * _PIXEL_M / metres
        width, height = (_positive(_text(matrix, side), side, host) for side in ("TileWidth", "TileHeight"))
        corner_text = _text(matrix, "TopLeftCorner")
        try:
            first, second = (float(v) for v in corner_text.split())
        except ValueError:
            raise _wrong(host, f"the TopLeftCorner {corner_text[:40]!r}") from None
        if width != height or int(width) != width:
            continue
        columns, rows = (
            int(_positive(_text(matrix, part), part, host)) if _text(matrix, part) else 1 << 30
            for part in ("MatrixWidth", "MatrixHeight")
        )
        name = _text(matrix, "Identifier")
        found.append(Matrix(name, first, second, pixel * width, columns, rows, int(width)))
    if crs == MERCATOR and (zooms := _xyz_zooms(found)):
        return TileGrid(), zooms
    if not found or len({m.tile_px for m in found}) > 1:
        return None
    found = [replace(m, left=m.top, top=m.left) for m in found] if _north_first(found[-1], crs) else found
    found.sort(key=lambda m: -m.side)
    numbered = dict(enumerate(found))
    return TileGrid(crs, numbered), {zoom: matrix.name for zoom, matrix in numbered.items()}


def _xyz_zooms(matrices: list[Matrix]) -> dict[int, str]:
    """Return the names of the zooms of XYZ services among tile matrices of EPSG:3857."""
    found = {}
    for matrix in matrices:
        zoom = math.log2(2 * HALF_WORLD_M / matrix.side)
        # Off by less than a thousandth of a zoom: rounded constants; the corner within ten metres likewise.
        corner = abs(matrix.left + HALF_WORLD_M) < 10 and abs(matrix.top - HALF_WORLD_M) < 10
        if corner and abs(zoom - round(zoom)) < 1e-3 and 0 <= round(zoom) <= 24:
            found[round(zoom)] = matrix.name
    return found


def _north_first(matrix: Matrix, crs: str) -> bool:
    """Return whether corners are written north before east: as the CRS has it, unless that leads out of its ground.

    Servers differ: some write east before north for every CRS.
    """
    defined, area = northing_first(crs), area_of_use(crs)
    if area is None:
        return defined

    def meets(left: float, top: float) -> bool:
        right, bottom = left + matrix.side * matrix.columns, top - matrix.side * matrix.rows
        return left < area[2] and right > area[0] and bottom < area[3] and top > area[1]

    straight, swapped = meets(matrix.left, matrix.top), meets(matrix.top, matrix.left)
    return defined if straight == swapped else swapped


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


def _tms(root: ElementTree.Element, url: str, host: str) -> TileService:
    crs = _text(root, "SRS")
    if known_crs(crs) != MERCATOR:
        raise UsageError(
            f"The tiles of {host} are in {crs or 'an unknown CRS'}, and a TMS is read in EPSG:3857 alone.",
            hint="Ask for its WMTS, which may be in any CRS: wmts:ADDRESS#LAYER; or download the image.",
        )
    formats = _all(root, "TileFormat")
    side = _positive(formats[0].get("width", "256"), "width", host) if formats else 256.0
    ending = formats[0].get("extension", "png") if formats else "png"
    names = {}
    bases = set()
    for tiles in _all(root, "TileSets", "TileSet"):
        zoom = math.log2(
            2 * HALF_WORLD_M / (_positive(tiles.get("units-per-pixel", ""), "units-per-pixel", host) * side)
        )
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
        unfilled="",
        name=_text(root, "Title") or host,
        attribution=_text(root, "Attribution", "Title") or f"unknown: see the terms of use of {host}",
        min_zoom=min(names),
        max_zoom=max(names),
        zoom_names=names,
    )
