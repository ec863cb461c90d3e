"""Tile services by template or by name: addresses of tiles, attribution, and keys that are never shown.

``{x}``, ``{y}`` (``{-y}`` counts rows from the south: TMS), ``{z}``, ``{q}`` (quadkey), ``{s}`` (subdomain), ``{r}``
(``@2x``). Any other ``{name}`` is read from the environment: ``NAME`` as written, or ``RSOSM_NAME`` in capitals.
Services that describe themselves (WMTS, TMS) are in :mod:`rsosm_cli.imagery.described`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from rsosm_cli.address import display, host_of, identity
from rsosm_cli.errors import UsageError
from rsosm_cli.imagery.tile_grid import TileGrid

PLACES = re.compile(r"\{(-?[A-Za-z_][A-Za-z0-9_]*)\}")
# A service that describes itself: its kind, then the address of the description.
PREFIXED = re.compile(r"(wmts|tms):(https?://.+)")
_WHERE = {"x", "y", "-y", "z", "q", "s", "r"}


@dataclass(frozen=True)
class TileService:
    """A tile service. ``template`` may hold keys: only ``shown`` and ``name`` are for logs, records and errors.

    ``unfilled``: the template as it was written, keys of the environment left as ``{NAME}``; others may be in it.
    """

    template: str = field(repr=False)
    unfilled: str = field(repr=False)
    name: str
    attribution: str
    min_zoom: int = 0
    max_zoom: int = 24
    subdomains: tuple[str, ...] = ("a", "b", "c")
    zoom_names: Mapping[int, str] | None = None  # what a zoom is called in an address; None: its number
    grid: TileGrid = field(default_factory=TileGrid)

    @cached_property
    def shown(self) -> str:
        return display(self.unfilled)

    @cached_property
    def identity(self) -> str:
        """16 hex digits that name the service's folder of tiles; keys do not enter, everything else does."""
        return identity(self.unfilled)

    @property
    def server(self) -> str:
        """The service and where it is, for errors."""
        host = host_of(self.shown)
        return self.name if self.name in (host, urlsplit(self.shown).hostname) else f"{self.name} at {host}"

    @property
    def licence(self) -> str:
        host = urlsplit(self.shown).hostname or self.name
        return f"terms of use of {host}; check that they allow derived data before redistributing"

    def url(self, z: int, x: int, y: int) -> str:
        zoom = (self.zoom_names or {}).get(z, str(z))
        values = {
            "x": str(x), "y": str(y), "-y": str(self.grid.matrix(z).rows - 1 - y), "z": zoom, "q": quadkey(z, x, y),
            "r": "@2x", "s": self.subdomains[(x + y) % len(self.subdomains)],
        }  # fmt: skip
        return PLACES.sub(lambda match: values[match[1]], self.template)


def quadkey(z: int, x: int, y: int) -> str:
    """Return the quadkey of a tile: a digit a zoom, 1 for the eastern half plus 2 for the southern half."""
    return "".join(str((x >> i & 1) + 2 * (y >> i & 1)) for i in range(z - 1, -1, -1))


def is_template(source: str) -> bool:
    return "://" in source and any(place in source for place in ("{q}", "{x}", "{y}", "{-y}", "{z}"))


def is_tile_service(source: str) -> bool:
    """Return whether a source names a tile service of any kind; nobody is asked."""
    return PREFIXED.match(source) is not None or tile_service(source) is not None


def is_described(source: str) -> bool:
    """Return whether the description of a service must be asked for, to know its tiles."""
    match = PREFIXED.match(source)
    return match is not None and not (match[1] == "tms" and "{x}" in match[2])


def tile_service(source: str, environment: Mapping[str, str] = os.environ) -> TileService | None:
    """Return the tile service that a source names, or None where it names none (a file, perhaps).

    Raises :class:`UsageError` where a key is not in the environment or the template lacks a place.
    """
    if is_template(source):
        lacking = [n for n in ("z", "x", "y") if f"{{{n}}}" not in source and f"{{-{n}}}" not in source]
        if "{q}" not in source and lacking:
            raise UsageError(
                f"The template {display(source)} has no {{{lacking[0]}}}.",
                hint="Write where zoom, column and row of a tile stand: {z}, {x}, {y}.",
            )
        names = [n for n in PLACES.findall(source) if n not in _WHERE]
        template = filled(source, {n: from_environment(n, display(source), environment) for n in names})
        try:
            host = urlsplit(source).hostname or display(source)
        except ValueError:  # as https://[host/...
            raise UsageError(
                f"The template {display(source)} is no address.", hint="It begins with https:// and a host."
            ) from None
        return TileService(template, source, host, f"unknown: see the terms of use of {host}")
    if "://" in source or os.sep in source or Path(source).exists():
        return None
    return _named(source, environment)


def _named(name: str, environment: Mapping[str, str]) -> TileService | None:
    import xyzservices.providers

    try:
        provider = xyzservices.providers.query_name(name)
    except ValueError:
        return None
    url = str(provider["url"])
    known: dict[str, str] = {}
    secret: dict[str, str] = {}
    for part in PLACES.findall(url):
        if part in _WHERE:
            continue
        value = str(provider.get(part, "<insert"))
        if value.startswith("<insert"):
            secret[part] = from_environment(part, provider["name"], environment)
        else:
            known[part] = value
    unfilled = filled(url, known)
    offset = int(provider.get("zoomOffset", 0))
    return TileService(
        template=filled(unfilled, secret),
        unfilled=unfilled,
        name=str(provider["name"]),
        attribution=str(provider.get("attribution", "")),
        min_zoom=max(0, int(provider.get("min_zoom", 0)) + offset),
        max_zoom=min(24, int(provider.get("max_zoom", 24)) + offset),
        subdomains=tuple(provider.get("subdomains", "abc")),
    )


def similar(name: str) -> list[str]:
    """Return names of xyzservices that a name may be meant for."""
    import xyzservices.providers

    known = list(xyzservices.providers.flatten())
    lower = {k.lower(): k for k in known}
    return [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.8)]


def filled(template: str, values: Mapping[str, str]) -> str:
    return PLACES.sub(lambda match: values.get(match[1], match[0]), template)


def from_environment(name: str, service: str, environment: Mapping[str, str]) -> str:
    ours = f"RSOSM_{name.upper()}"
    value = environment.get(name) or environment.get(ours)
    if not value:
        raise UsageError(
            f"The tile service {service} needs {{{name}}}, and the environment has neither {name} nor {ours}.",
            hint=f"For example: export {ours}=...",
            variable=ours,
        )
    return value
