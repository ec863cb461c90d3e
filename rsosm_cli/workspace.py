"""Where the files of a city and of a run live; manifests, atomic writes, locks.

Files appear whole or not at all: everything is written beside its target and renamed. A step is finished when the
manifest records it with the fingerprint of its inputs and settings, and its files are still what it wrote.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsosm_cli import __version__
from rsosm_cli.errors import DiskError, FormatError, MissingError, UsageError
from rsosm_cli.records import misfit
from rsosm_cli.units import size

log = logging.getLogger("rsosm")

DAY_S = 86_400.0

# Names that Windows reserves: a folder of ours may be copied there.
_RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"com{i}" for i in range(1, 10)),
    *(f"lpt{i}" for i in range(1, 10)),
}


# Key of a city's manifest: the sources of an image whose making was broken off.
IMAGERY_NOT_YET = "imagery_not_yet"


@dataclass(frozen=True)
class CityFiles:
    """The files of one city under a root."""

    name: str
    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / "place.geojson"

    @property
    def osm(self) -> Path:
        return self.folder / "osm.parquet"

    @property
    def imagery(self) -> Path:
        return self.folder / "imagery.tif"

    def imagery_of(self, epoch: str | None) -> Path:
        """Return the image of an epoch (``imagery-2019.tif``); None: the city's image of no particular date."""
        return self.imagery if epoch is None else self.folder / f"imagery-{epoch}.tif"

    def epochs(self) -> list[str]:
        """Return the epochs that the city has images of, sorted."""
        return sorted(path.stem.partition("-")[2] for path in self.folder.glob("imagery-*.tif"))

    def sources(self) -> dict[str, dict[str, Any]]:
        """Return what identifies the files that tiles are made of, as far as they are there."""
        return {path.name: file_stamp(path) for path in (self.osm, self.imagery) if path.exists()}

    @property
    def tiles(self) -> Path:
        return self.folder / "tiles.h5"

    @property
    def embeddings(self) -> Path:
        return self.folder / "embeddings.h5"

    @property
    def maps(self) -> Path:
        return self.folder / "maps"

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.folder / "manifest.json")


@dataclass(frozen=True)
class Workspace:
    """A root folder."""

    root: Path

    @classmethod
    def at(cls, root: Path | str | None = None) -> Workspace:
        """Return the workspace at ``root``, by default at ``RSOSM_ROOT`` or ``rsosm-data``."""
        return cls(Path(root or os.environ.get("RSOSM_ROOT") or "rsosm-data"))

    def city(self, name: str) -> CityFiles:
        return CityFiles(name, self.root / "cities" / slug(name))

    def run(self, name: str) -> Path:
        return self.root / "runs" / slug(name)

    @property
    def extracts(self) -> Path:
        """Where downloaded extracts of OSM are kept, for every city that lies in one."""
        return self.root / "extracts"

    def cities(self) -> list[CityFiles]:
        """Return the cities that have a manifest, by folder name."""
        found = []
        for path in sorted(self.root.glob("cities/*/manifest.json")):
            try:
                name = Manifest(path).read().get("name") or path.parent.name
            except FormatError:  # told by what reads more of the city; the others are none the worse for it
                name = path.parent.name
            found.append(CityFiles(name, path.parent))
        return found

    def require(self, name: str) -> CityFiles:
        """Return the files of a city that something was fetched of. Raises :class:`MissingError`."""
        files = self.city(name)
        if files.manifest.path.exists():
            return files
        hint = f'Run `rsosm fetch --city "{name}"` first.'
        folders = [path.parent.name for path in self.root.glob("cities/*/manifest.json")]
        if close := difflib.get_close_matches(files.folder.name, sorted(folders), n=1):
            known = _name_in(files.folder.with_name(close[0]))
            hint = f'There is {known}: is it meant? If not, run `rsosm fetch --city "{name}"` first.'
        raise MissingError(f"There is nothing of {name} under {files.folder.parent}.", hint=hint, city=name)

    def place_of(self, name: str) -> Path:
        """Return the boundary of a city. Raises :class:`MissingError`."""
        files = self.city(name)
        if not files.place.is_file():
            self.require(name)
            raise MissingError(
                f"{name} has no boundary yet: there is no {files.place}.",
                hint=f'Run `rsosm fetch --city "{name}"` again: it goes on where it stopped.',
                city=name,
            )
        return files.place

    def tiles_of(self, name: str) -> Path:
        """Return the tile store of a city. Raises :class:`MissingError`."""
        files = self.city(name)
        if not files.tiles.is_file():
            self.require(name)
            raise MissingError(
                f"There are no tiles of {name} under {self.root}.",
                hint=f'Run `rsosm build-graph --city "{name}"` first.',
                city=name,
            )
        return files.tiles


def _name_in(folder: Path) -> str:
    """Return the name of the city of a folder, for a hint: its damaged record is told where that city is meant."""
    try:
        return str(Manifest(folder / "manifest.json").read().get("name") or folder.name)
    except FormatError:
        return folder.name


def cache_folder() -> Path:
    """Return where caches live: `RSOSM_CACHE`, else the platform's folder for the user's caches."""
    if chosen := os.environ.get("RSOSM_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rsosm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "rsosm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsosm"


def slug(name: str) -> str:
    """Return a folder name for a city: Unicode letters and digits kept, everything else a hyphen.

    Names that would collide, be reserved, too long or empty carry eight hex digits of the name's SHA-256.
    """
    plain = unicodedata.normalize("NFC", name).strip()
    if not plain:
        raise UsageError("The name of the city is empty.", hint="Give one: --city Shenzhen")
    folded = plain.casefold()
    base = re.sub(r"[\W_]+", "-", folded).strip("-")
    # The plain form is kept only where it says everything that the name says (but case and spaces): folding makes
    # ss of ß. The two small sigmas are one letter, whose form follows from its place.
    lower = plain.lower().replace("ς", "σ")
    faithful = base == re.sub(r"\s+", "-", folded) and lower == folded.lower()
    if faithful and base not in _RESERVED and len(base.encode()) <= 80:
        return base
    digest = hashlib.sha256(lower.encode()).hexdigest()[:8]
    head = base.encode()[:60].decode(errors="ignore").strip("-")
    return f"{head}-{digest}" if head else digest


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; rename it on success, remove it on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_of(path):
            yield part
            os.replace(part, path)
    except BaseException:
        _remove(part)
        raise


@contextmanager
def disk_of(path: Path) -> Iterator[None]:
    """Raise :class:`DiskError` where what writes ``path`` finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskError(
            f"The disk is full: {path.name} was not written.", hint="Free some space and run the command again.",
            path=str(path),
        ) from error  # fmt: skip


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, sort_keys: bool = True) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2, sort_keys=sort_keys) + "\n")


def require_space(folder: Path, needed_bytes: float, what: str) -> None:
    """Raise :class:`DiskError` where the disk of ``folder`` has less than ``needed_bytes`` free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskError(
            f"{what} needs {size(needed_bytes)}, and {folder} has {size(free)} free.",
            hint="Free some space or choose another --root.",
            needed=needed_bytes,
            free=free,
        )


@contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold a lock of a folder among processes; the second waits for the first, and says so after a second."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info("Waiting for another rsosm, which holds %s.", lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def utc(seconds: float) -> str:
    """Return a time in seconds since 1970 as it is recorded, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that change when any of the JSON-able ``parts`` changes."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_stamp(path: Path) -> dict[str, Any]:
    """Return what identifies a user's file without reading it whole: name, size, time of change.

    Not its folder: what was made stays valid when a root is moved, or mounted elsewhere.
    """
    info = path.stat()
    return {"name": path.name, "bytes": info.st_size, "mtime_ns": info.st_mtime_ns}


class Manifest:
    """``manifest.json``: what was done to a city, from what; a step's ``key`` fingerprints inputs and settings."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (ValueError, RecursionError, OSError) as error:
            raise FormatError(
                f"{self.path} is damaged: {error}.", hint="Delete it to start the city's record over."
            ) from error
        if wrong := misfit(data):
            raise FormatError(f"{self.path} is damaged: {wrong}.", hint="Delete it to start the city's record over.")
        return dict(data)

    def step(self, name: str) -> dict[str, Any]:
        return dict(self.read().get("steps", {}).get(name, {}))

    def finished(self, name: str, key: str) -> bool:
        """Return whether step ``name`` is recorded with ``key`` and its files are as they were written."""
        step = self.step(name)
        if step.get("key") != key:
            return False
        for file, written in step.get("files", {}).items():
            path = self.path.parent / file
            if not path.exists() or path.stat().st_size != written:
                return False
        return True

    def record(self, name: str, key: str, *, files: list[Path], seconds: float, **facts: Any) -> None:
        """Record a finished step; ``files`` lie in the manifest's folder."""
        sizes = {str(p.relative_to(self.path.parent)): p.stat().st_size for p in files}
        step = {
            "key": key,
            "files": sizes,
            "finished": utc(time.time()),
            "seconds": round(seconds, 3),
            "rsosm": __version__,
            **facts,
        }
        with locked(self.path.parent, "manifest.lock"):
            data = self.read()
            data.setdefault("steps", {})[name] = step
            write_json(self.path, data, sort_keys=False)  # numbers are shown again in the order they were given

    def update(self, **facts: Any) -> None:
        with locked(self.path.parent, "manifest.lock"):
            write_json(self.path, {**self.read(), **facts}, sort_keys=False)


def provenance(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the sources (name, licence, attribution) recorded by the steps of a city's manifest."""
    sources: list[dict[str, str]] = []
    for step in manifest.get("steps", {}).values():
        sources += [s for s in step.get("sources", []) if s not in sources]
    return sources
