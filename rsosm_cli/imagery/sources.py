"""What a user may name as imagery, before any of it is opened: files, folders, patterns, addresses."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl

from rsosm_cli.address import HIDDEN, display
from rsosm_cli.errors import MissingError, NoFileError, UsageError
from rsosm_cli.imagery.service import similar

# Files that a folder of imagery is searched for.
SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img", ".png", ".jpg", ".jpeg", ".webp")
# How GDAL reads rasters in place from where an address points to.
_REMOTE = {"http": "/vsicurl/http://", "https": "/vsicurl/https://", "s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}

_ADDRESS = re.compile(r"[a-z0-9]+://\S+", re.IGNORECASE)
# GDAL's other way to write /vsicurl/: /vsicurl?use_head=no&url=https%3A%2F%2Fhost%2Fa.tif; options that hold no key.
_OPTIONS = re.compile(r"/vsi\w+\?(.*)")
_HARMLESS = {"url", "use_head", "max_retry", "retry_delay", "retry_codes", "list_dir", "empty_dir", "pc_url_signing"}


def is_remote(source: str) -> bool:
    """Whether a source is an address, of a tile service or of a raster."""
    return "://" in source


def raster_paths(source: str) -> list[str]:
    """Return the rasters that a source names: itself, those of a folder, or those of a pattern; absolute paths."""
    if source.startswith("/vsi"):  # GDAL's own way to name what is behind an address or in an archive
        _check_vsi(source)
        return [source]
    if is_remote(source):
        return [_gdal_path(source)]
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise MissingError(f"There is no raster in {path}.", hint=f"Looked for {', '.join(SUFFIXES)}.")
        return [str(p.resolve()) for p in found]
    if not path.exists() and glob.has_magic(source):
        matches = sorted(glob.glob(os.path.expanduser(source)))
        if not matches:
            raise MissingError(f"No raster matches {source}.", hint="Check the pattern, and the folder it begins with.")
        return [str(Path(p).resolve()) for p in matches]
    if not path.exists():
        near = similar(source)
        raise NoFileError(
            f"There is no raster {source}.",
            hint=f"A service of xyzservices is called {' or '.join(near)}."
            if near
            else "Imagery is a raster, a folder, a pattern, a template with {x}, {y} and {z}, or a service's name.",
        )
    return [str(path.resolve())]


def _gdal_path(address: str) -> str:
    scheme, _, rest = address.partition("://")
    if scheme not in _REMOTE:
        raise UsageError(f"Imagery at {display(address)} cannot be read: {scheme} is not one of {', '.join(_REMOTE)}.")
    _refuse_keys(address, display(address))
    return _REMOTE[scheme] + rest


def _check_vsi(source: str) -> None:
    """Refuse a name of GDAL's in which there is a key, or may be one."""
    options = _OPTIONS.search(source)
    if options is None:
        if (address := _ADDRESS.search(source)) is not None:
            _refuse_keys(address[0], display(address[0]))
        return
    shown = source.partition("?")[0]
    _refuse_keys(f"vsi://options?{options[1]}", shown)
    values = parse_qsl(options[1], keep_blank_values=True)
    addresses = [value for name, value in values if name == "url"]
    if len(addresses) != 1 or not _ADDRESS.match(addresses[0]) or not {name for name, _ in values} <= _HARMLESS:
        raise UsageError(
            f"{shown}?... is a form of address that is not supported.",
            hint="Name the raster by its address alone: https://host/a.tif",
        )


def _refuse_keys(address: str, shown: str) -> None:
    if HIDDEN in display(address):
        raise UsageError(
            f"The address {shown} holds a key, which imagery.tif would have to hold, too.",
            hint="Download the raster and name the file.",
        )


def address_of(path: str) -> str:
    """Return a raster that :func:`raster_paths` named as the user knows it: ``s3://...`` for ``/vsis3/...``."""
    for scheme, prefix in _REMOTE.items():
        if path.startswith(prefix):
            return display(f"{scheme}://{path.removeprefix(prefix)}")
    return path
