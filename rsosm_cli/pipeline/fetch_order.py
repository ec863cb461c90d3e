"""What a fetch is asked for, resolved: which sources, and the fingerprints that say whether the work is done."""

from __future__ import annotations

import math
import os
import re
import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsosm_cli.address import display, identity
from rsosm_cli.errors import NoFileError, RsosmError, UsageError
from rsosm_cli.imagery.checks import check_sources
from rsosm_cli.imagery.service import is_tile_service
from rsosm_cli.imagery.sources import SUFFIXES
from rsosm_cli.osm.extract import is_osm_file
from rsosm_cli.osm.vectors import is_vector_file
from rsosm_cli.places.place import Place
from rsosm_cli.progress import Progress
from rsosm_cli.settings import FetchSettings, RootSettings, load_yaml, validate
from rsosm_cli.workspace import CityFiles, Workspace, file_stamp, fingerprint

FORMAT = 1  # raised when place.geojson or osm.parquet change, so that old ones are fetched again
Service = Literal["overpass", "geofabrik", "auto"]
SERVICES: tuple[Service, ...] = ("overpass", "geofabrik")
_PREFIX = re.compile(r"(stac|wmts|tms):")
_EPOCH = re.compile(r"[0-9A-Za-z][0-9A-Za-z-]{0,31}")


@dataclass(frozen=True)
class Order:
    """What is asked for, resolved."""

    city: str
    files: CityFiles
    service: Service | None  # where the OSM elements come from; None: the files `osm`
    osm: tuple[Path, ...]
    keep_place: bool  # nothing says where the place is from: the one that is there stays
    keep: bool  # nor where the OSM elements are from
    same_place: bool  # only other elements are asked for: the place is looked for as it was last time
    imagery: tuple[str, ...]
    boundary: str | None
    bbox: tuple[float, float, float, float] | None
    osm_id: str | None
    gsd: float | None
    epoch: str | None  # which of the city's images is meant; None: imagery.tif
    settings: FetchSettings
    offline: bool
    force: bool
    progress: Progress

    @property
    def image(self) -> Path:
        return self.files.imagery_of(self.epoch)

    @property
    def image_part(self) -> str:
        """The name of the imagery's part in the manifest: ``imagery``, or ``imagery-2019``."""
        return self.image.stem

    def config(self) -> dict[str, Any]:
        """Return the resolved settings as they are written beside the results."""
        return {
            "city": self.city,
            "osm": "kept" if self.keep else [str(p) for p in self.osm] or [self.service],
            "imagery": [display(source) for source in self.imagery],  # keys and passwords in addresses hidden
            "epoch": self.epoch,
            "boundary": self.boundary,
            "bbox": None if self.bbox is None else list(self.bbox),
            "osm_id": self.osm_id,
            "gsd": self.gsd,
            **{k: display(v) if k.endswith("_url") else v for k, v in self.settings.model_dump(mode="json").items()},
        }

    def route(self, place: Place) -> Service | None:
        """Return where the OSM elements of ``place`` come from: above the limit of Overpass, from an extract."""
        if self.service != "auto":
            return self.service
        small = place.area_km2 <= self.settings.overpass_max_km2 or self.settings.date is not None
        return "overpass" if small else "geofabrik"

    def place_asked(self) -> dict[str, Any]:
        """Return what says where the place is, as the record keeps it for a run that starts over."""
        files = self.boundary in (None, "extract") and self.bbox is None
        named = self.boundary in (None, "extract", "nominatim")
        return {
            "boundary": self.boundary if named else os.path.abspath(str(self.boundary)),
            "bbox": None if self.bbox is None else list(self.bbox),
            "osm_id": self.osm_id,
            "files": [os.path.abspath(p) for p in self.osm] if files else [],
        }

    def osm_asked(self) -> dict[str, Any]:
        """Return where the elements are from, likewise."""
        date = None if self.settings.date is None else self.settings.date.isoformat()
        return {"service": self.service, "files": [os.path.abspath(p) for p in self.osm], "date": date}

    def place_key(self) -> str:
        if self.keep_place:
            return str(self.files.manifest.step("fetch:place")["key"])
        from_files = self.bbox is None and (self.boundary in (None, "extract"))
        stamps = [file_stamp(p) for p in self.osm] if from_files else []
        if self.boundary not in (None, "extract", "nominatim"):
            stamps.append(file_stamp(Path(self.boundary)))
        server = self.settings.nominatim_url if not stamps else ""
        return fingerprint(FORMAT, self.city, self.boundary, self.bbox, self.osm_id, server, stamps)

    def osm_key(self, place_key: str, place: Place) -> str:
        if self.keep:
            return str(self.files.manifest.step("fetch:osm")["key"])
        route, s = self.route(place), self.settings
        if route == "geofabrik":
            return fingerprint(FORMAT, place_key, route, s.extracts_url)
        if route == "overpass":
            return fingerprint(FORMAT, place_key, route, s.overpass_url, s.date)
        return fingerprint(FORMAT, place_key, [file_stamp(p) for p in self.osm])

    def imagery_key(self, place_key: str) -> str:
        if not self.imagery:
            return ""
        from rsosm_cli.imagery.prepare import raster_paths

        sources: list[Any] = []
        for source in self.imagery:
            if source.startswith("stac:") or is_tile_service(source):
                sources.append(identity(source))  # another key gives the same imagery
            else:  # local files by what they are now, addresses by name
                paths = [Path(p) for p in raster_paths(source)]
                sources += [file_stamp(p) if p.is_file() else str(p) for p in paths]
        s = self.settings
        stac = (s.stac_dates, s.stac_clouds, s.stac_mosaic, s.stac_items)
        kept = () if s.xyz_placeholders else ("placeholders",)
        return fingerprint(FORMAT, place_key, sources, self.gsd, s.xyz_zoom, s.nodata, s.bands, stac, *kept)


def resolve_order(
    city: str,
    workspace: Workspace,
    *,
    osm: Sequence[str | Path],
    imagery: Sequence[str],
    boundary: str | Path | None,
    bbox: tuple[float, float, float, float] | None,
    osm_id: str | None,
    gsd: float | None,
    epoch: str | None,
    settings: FetchSettings,
    offline: bool,
    force: bool,
    progress: Progress,
) -> Order:
    """Return the order that options, environment and the root's defaults make.

    Raises :class:`UsageError` and :class:`MissingError` for what cannot be read.
    """
    defaults = root_settings(workspace)
    if not settings.contact and defaults.contact:
        settings = settings.model_copy(update={"contact": defaults.contact})
    files = workspace.city(city)
    _check_name(files, city)
    place_said = any(value is not None for value in (boundary, bbox, osm_id))
    if not osm and not place_said and (force or _begun(files)):
        osm, settings = _recorded_elements(files, settings)
        boundary, bbox, osm_id = _recorded_place(files)
    same_place = False
    if osm and not place_said:
        boundary, bbox, osm_id = _recorded_place(files)
        if boundary == "extract" and str(osm[0]) in SERVICES:  # its box is one of files
            boundary = None
        same_place = any(value is not None for value in (boundary, bbox, osm_id))
    service, paths = _osm_sources(osm)
    placed = bool(paths) or any(value is not None for value in (boundary, bbox, osm_id))
    keep_place = not placed and not force and _there(files, "place")
    # An age is one of extracts of the index and of Overpass's answers on today's state: other elements stay.
    aging = _aging(files) if settings.max_age_days is not None else None
    said = bool(osm) or settings.date is not None or aging is not None
    if keep_place and aging is not None and service == "auto" and settings.date is None:
        service = aging  # where they are from: the other would give others
    _check_date(service, epoch, settings)
    if epoch is not None:
        _check_epoch(epoch, imagery)
    named = tuple(imagery) or _imagery_of_environment() or defaults.imagery
    order = Order(
        city=city,
        files=files,
        keep_place=keep_place,
        keep=keep_place and not said and _there(files, "osm"),
        same_place=same_place,
        service=service,
        osm=paths,
        imagery=named,
        boundary=None if boundary is None else str(boundary),
        bbox=bbox,
        osm_id=osm_id,
        gsd=gsd if gsd is not None else defaults.gsd,
        epoch=epoch,
        settings=settings,
        offline=offline,
        force=force,
        progress=progress,
    )
    if order.boundary not in (None, "extract", "nominatim") and not Path(order.boundary).is_file():
        raise NoFileError(
            f"There is no boundary file {order.boundary}.",
            hint="--boundary takes a vector file, or the word extract or nominatim.",
        )
    if order.gsd is not None and not 0 < order.gsd < math.inf:
        raise UsageError(f"--gsd {order.gsd:g} is no size of a pixel.", hint="Give metres on the ground: --gsd 0.6")
    try:
        check_sources(order.imagery, settings)
    except RsosmError as error:
        if imagery:
            raise
        where = "RSOSM_IMAGERY" if _imagery_of_environment() else f"`imagery` of {_defaults_file(workspace)}"
        raise type(error)(f"{where}: {error.message}", hint=error.hint, **error.data) from None
    return order


def _check_name(files: CityFiles, city: str) -> None:
    """Refuse a name that differs from that of the city in its folder by more than case and spaces."""
    there = str(files.manifest.read().get("name") or city)
    if len({tuple(unicodedata.normalize("NFC", name).casefold().split()) for name in (there, city)}) > 1:
        raise UsageError(
            f"{city} would have the folder of {there}: {files.folder}.",
            hint=f"Is it the same city? Then write --city {shlex.quote(there)}; else give it a name that differs in a "
            "letter.",
        )


def _defaults_file(workspace: Workspace) -> Path:
    return workspace.root / "config.yaml"


def root_settings(workspace: Workspace) -> RootSettings:
    """Return the user's defaults of a root, paths of rasters as from its folder.

    Raises :class:`UsageError` naming file and key.
    """
    path = _defaults_file(workspace)
    if not path.is_file():
        return RootSettings()
    defaults = validate(RootSettings, load_yaml(path), str(path))
    return defaults.model_copy(update={"imagery": tuple(_from_folder(s, path.parent) for s in defaults.imagery)})


def _from_folder(source: str, folder: Path) -> str:
    """Return a source of imagery with the path of a raster as from ``folder``; addresses and names stay."""
    path = Path(source).expanduser()
    if "://" in source or _PREFIX.match(source) or path.is_absolute():
        return source
    is_path = os.sep in source or path.suffix.lower() in SUFFIXES or (folder / path).exists()
    return str(folder / path) if source.strip() and is_path else source


def _check_epoch(epoch: str, imagery: Sequence[str]) -> None:
    if _EPOCH.fullmatch(epoch) is None:
        raise UsageError(
            f"--epoch {epoch!r} cannot be part of a file's name.", hint="Letters, digits and hyphens: --epoch 2019"
        )
    if not imagery:  # the root's default is the city's image of no particular date
        raise UsageError(f"--epoch {epoch} names no imagery.", hint=f"Add it: --epoch {epoch} --imagery FILE.tif")


def _recorded_place(files: CityFiles) -> tuple[str | None, tuple[float, float, float, float] | None, str | None]:
    """Return boundary, box and id by which a city was found.

    Raises :class:`NoFileError` where the boundary was a file that is gone.
    """
    place = files.manifest.step("fetch:place").get("asked", {})
    boundary, bbox = place.get("boundary"), place.get("bbox")
    if boundary not in (None, "extract", "nominatim"):
        _still_there(files, boundary, "--boundary FILE, --bbox or --osm-id")
    return boundary, None if bbox is None else tuple(bbox), place.get("osm_id")


def _recorded_elements(files: CityFiles, settings: FetchSettings) -> tuple[Sequence[str | Path], FetchSettings]:
    """Return the sources that a city's elements are of, and the settings with their date.

    Raises :class:`NoFileError` where a file of them is gone.
    """
    found = files.manifest.step("fetch:place").get("elements_asked", {})  # of a fetch that never came to its elements
    elements = files.manifest.step("fetch:osm").get("asked", found)
    for path in elements.get("files", []):
        _still_there(files, path, "--osm FILE, overpass or geofabrik")
    service = elements.get("service")
    osm = [Path(p) for p in elements.get("files", [])] or ([service] if service in SERVICES else [])
    if elements.get("date") and settings.date is None:
        settings = validate(FetchSettings, settings.model_dump() | {"date": elements["date"]}, "the record of the city")
    return osm, settings


def _still_there(files: CityFiles, path: str, others: str) -> None:
    if not Path(path).is_file():
        raise NoFileError(
            f"{files.folder.name} was made of {path}, which is not there any more.",
            hint=f"Name what to start over from: {others}.",
        )


def _begun(files: CityFiles) -> bool:
    """Return whether a city has its place, and never had elements: its fetch goes on from the sources it began with."""
    return _there(files, "place") and not files.manifest.step("fetch:osm")


def _there(files: CityFiles, part: str) -> bool:
    manifest = files.manifest
    return manifest.finished(f"fetch:{part}", manifest.step(f"fetch:{part}").get("key", "-"))


def _aging(files: CityFiles) -> Service | None:
    """Return the service that the elements are from, if what it answered grows old; the past does not."""
    step = files.manifest.step("fetch:osm")
    return "geofabrik" if "extract" in step else "overpass" if "overpass" in step else None


def _imagery_of_environment() -> tuple[str, ...]:
    value = os.environ.get("RSOSM_IMAGERY", "").strip()
    return (value,) if value else ()


def _osm_sources(osm: Sequence[str | Path]) -> tuple[Service | None, tuple[Path, ...]]:
    """Return the service that ``--osm`` names (``auto`` where it names nothing), or the files."""
    if isinstance(osm, str | Path):
        osm = [osm]
    if not osm:
        return "auto", ()
    for word in SERVICES:
        if word in [str(o) for o in osm]:
            if len(osm) > 1:
                raise UsageError(f"--osm {word} excludes other sources of OSM elements.", hint="Give one or the other.")
            return word, ()
    if any(not str(o).strip() for o in osm):
        raise UsageError("A source of OSM elements is empty.", hint="Give a file: --osm FILE.osm.pbf")
    for address in (str(o) for o in osm if "://" in str(o)):
        raise UsageError(
            f"--osm takes files on this disk, and {display(address)} is an address.",
            hint="Download it and name the file; or take --osm geofabrik, with --set extracts_url=ADDRESS for an index "
            "of your own.",
        )
    files = tuple(Path(o) for o in osm)
    for path in files:
        if not path.is_file():
            what = f"{path} is a folder, and no OSM file." if path.is_dir() else f"There is no OSM file {path}."
            raise NoFileError(what, hint="Give a file, or one of the words overpass and geofabrik.")
        if not is_osm_file(path) and not is_vector_file(path):
            raise UsageError(
                f"{path.name} is neither an OSM file nor a vector file.",
                hint="Known: .osm.pbf, .osm.gz, .osm.bz2, .osm, .gpkg, .geojson, .parquet, .shp.",
            )
    return None, files


def _check_date(service: Service | None, epoch: str | None, settings: FetchSettings) -> None:
    if settings.date is None:
        return
    if service not in ("auto", "overpass"):
        where = "an extract" if service else "a file"
        raise UsageError(
            f"--date {settings.date} asks for a past state of OSM, which {where} does not have.",
            hint="Only --osm overpass looks back.",
        )
    if epoch is not None:
        raise UsageError(
            f"--epoch {epoch} keeps imagery beside the city's other, but --date would replace its OSM elements.",
            hint="Fetch them in two calls, or as two cities with one --bbox.",
        )
