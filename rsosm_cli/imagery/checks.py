"""What can be known to be wrong with a source of imagery before anybody is asked for anything."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from rsosm_cli.address import display
from rsosm_cli.errors import UsageError
from rsosm_cli.imagery.service import PLACES, PREFIXED, from_environment, is_described, is_tile_service, tile_service
from rsosm_cli.imagery.sources import raster_paths
from rsosm_cli.settings import FetchSettings

_EXAMPLES = {
    "stac": "stac:https://host/v1#sentinel-2-l2a",
    "wmts": "wmts:https://host/wmts#ortho",
    "tms": "tms:https://host/tilemapresource.xml",
}


def check_sources(sources: Sequence[str], settings: FetchSettings, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse sources and options that cannot work; nobody is asked, and no raster is opened.

    Raises :class:`UsageError` (an address or template that is none, a key that the environment lacks, a zoom that the
    service does not have, options of another kind of source), :class:`MissingError` (no such file).
    """
    for source in sources:
        if not source.strip():
            raise UsageError(
                "An imagery source is empty.", hint="Give a raster, a template or a service: --imagery SOURCE"
            )
        kind = source.partition(":")[0]
        if kind in _EXAMPLES:
            _check_address(source, kind)
        if kind == "stac":
            _check_stac(source)
        elif is_tile_service(source):
            _check_service(source, settings, environment)
        else:
            raster_paths(source)
            _check_numbers(settings)


def check_dates(dates: str | None, sources: Sequence[str]) -> None:
    """Raise :class:`UsageError` where ``--dates`` was said beside imagery that has no days to choose among.

    Not where no imagery is named (that of last time may be of STAC), nor of a file of settings for many cities.
    """
    if dates is not None and sources and not any(source.startswith("stac:") for source in sources):
        raise UsageError(
            f"--dates {dates} chooses among the images of a STAC collection, and none is named.",
            hint="Leave it out, or add --imagery stac:ADDRESS#COLLECTION (a past state of OSM is --date).",
        )


def unused_gsd(gsd_m: float | None) -> list[str]:
    """Return a sentence on a size of pixels that was asked for where rasters alone are named, which have their own.

    Not an error: it may be the root's default, said for the cities that come from a tile service.
    """
    if gsd_m is None:
        return []
    return [f"The rasters keep their own pixels: --gsd {gsd_m:g} is what tile services and STAC are asked for."]


def _check_address(source: str, kind: str) -> None:
    address = urlsplit(source[len(kind) + 1 :])
    if address.scheme not in ("http", "https") or not address.netloc:
        raise UsageError(
            f"{display(source)} does not name an address after {kind}:.", hint=f"For example: {_EXAMPLES[kind]}"
        )


def _check_stac(source: str) -> None:
    if not urlsplit(source.removeprefix("stac:")).fragment:
        raise UsageError(f"{display(source)} names no collection.", hint=f"For example: {_EXAMPLES['stac']}")
    if any(importlib.util.find_spec(name) is None for name in ("pystac_client", "odc.stac")):
        raise UsageError(
            "STAC needs the packages pystac-client and odc-stac, which are not installed.",
            hint="pip install 'rsosm[stac]'",
        )


def _check_service(source: str, settings: FetchSettings, environment: Mapping[str, str]) -> None:
    name = display(source)
    if is_described(source):
        for place in PLACES.findall(source):
            from_environment(place, name, environment)
    else:
        match = PREFIXED.match(source)
        service = tile_service(match[2] if match else source, environment)
        assert service is not None
        name = service.name
        if settings.xyz_zoom is not None and not service.min_zoom <= settings.xyz_zoom <= service.max_zoom:
            raise UsageError(f"{name} has zooms {service.min_zoom} to {service.max_zoom}, not {settings.xyz_zoom}.")
    if settings.bands:
        raise UsageError(
            f"--bands chooses among the bands of rasters, and {name} sends pictures in red, green and blue.",
            hint="Leave --bands out.",
        )
    if settings.nodata is not None and not 0 <= settings.nodata <= 255:
        raise UsageError(
            f"--nodata {settings.nodata} is no value of {name}, whose pixels are uint8: 0 to 255.",
            hint="Leave it out, or give the value that its missing pixels have (white: 255, black: 0).",
        )


def _check_numbers(settings: FetchSettings) -> None:
    if settings.bands and any(isinstance(band, str) for band in settings.bands):
        raise UsageError(
            f"--bands {','.join(map(str, settings.bands))} holds names, and bands of rasters have numbers.",
            hint="Count them from 1: --bands 4,3,2",
        )
