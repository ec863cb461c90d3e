"""Tile services by template or by name: addresses of tiles, attribution, and keys that are never shown.

``{x}``, ``{y}`` (``{-y}`` counts rows from the south: TMS), ``{z}``, ``{q}`` (quadkey), ``{s}`` (subdomain), ``{r}``
(``@2x``). Any other ``{name}`` is read from the environment: ``NAME`` as written, or ``RSOSM_NAME`` in capitals.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from rsosm_cli.address import display
from rsosm_cli.errors import UsageError
from rsosm_cli.workspace import fingerprint

_PLACEHOLDER = re.compile(r"\{(-?[A-Za-z_][A-Za-z0-9_]*)\}")
_WHERE = {"x", "y", "-y", "z", "q", "s", "r"}


@dataclass(frozen=True)
class TileService:
    """A tile service. ``template`` may hold keys: only ``shown`` and ``name`` are for logs, records and errors."""

    template: str = field(repr=False)
    shown: str
    name: str
    attribution: str
    min_zoom: int = 0
    max_zoom: int = 24
    subdomains: tuple[str, ...] = ("a", "b", "c")

    @property
    def identity(self) -> str:
        """16 hex digits that name the service's folder of tiles; keys do not enter."""
        return fingerprint(self.shown)

    @property
    def licence(self) -> str:
        host = urlsplit(self.shown).hostname or self.name
        return f"terms of use of {host}; check that they allow derived data before redistributing"

    def url(self, z: int, x: int, y: int) -> str:
        values = {
            "x": str(x), "y": str(y), "-y": str((1 << z) - 1 - y), "z": str(z), "q": quadkey(z, x, y), "r": "@2x",
            "s": self.subdomains[(x + y) % len(self.subdomains)],
        }  # fmt: skip
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.template)


def quadkey(z: int, x: int, y: int) -> str:
    """Return the quadkey of a tile: a digit a zoom, 1 for the eastern half plus 2 for the southern half."""
    return "".join(str((x >> i & 1) + 2 * (y >> i & 1)) for i in range(z - 1, -1, -1))


def is_template(source: str) -> bool:
    return "://" in source and ("{q}" in source or ("{x}" in source and ("{y}" in source or "{-y}" in source)))


def tile_service(source: str, environment: Mapping[str, str] = os.environ) -> TileService | None:
    """Return the tile service that a source names, or None where it names none (a file, perhaps).

    Raises :class:`UsageError` where a key is not in the environment or the template lacks a place.
    """
    if is_template(source):
        if "{q}" not in source and "{z}" not in source:
            raise UsageError(f"The template {display(source)} has no {{z}}.", hint="Write the zoom's place: {z}")
        names = [n for n in _PLACEHOLDER.findall(source) if n not in _WHERE]
        template = _filled(source, {n: _from_environment(n, display(source), environment) for n in names})
        shown = display(source)
        host = urlsplit(shown).hostname or shown
        return TileService(template, shown, host, f"unknown: see the terms of use of {host}")
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
    for part in _PLACEHOLDER.findall(url):
        if part in _WHERE:
            continue
        value = str(provider.get(part, "<insert"))
        if value.startswith("<insert"):
            secret[part] = _from_environment(part, provider["name"], environment)
        else:
            known[part] = value
    shown = _filled(url, known)
    offset = int(provider.get("zoomOffset", 0))
    return TileService(
        template=_filled(shown, secret),
        shown=shown,
        name=str(provider["name"]),
        attribution=str(provider.get("attribution", "")),
        min_zoom=max(0, int(provider.get("min_zoom", 0)) + offset),
        max_zoom=min(24, int(provider.get("max_zoom", 24)) + offset),
        subdomains=tuple(provider.get("subdomains", "abc")),
    )


def _filled(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def _from_environment(name: str, service: str, environment: Mapping[str, str]) -> str:
    ours = f"RSOSM_{name.upper()}"
    value = environment.get(name) or environment.get(ours)
    if not value:
        raise UsageError(
            f"The tile service {service} needs {{{name}}}, and the environment has neither {name} nor {ours}.",
            hint=f"For example: export {ours}=...",
            variable=ours,
        )
    return value
