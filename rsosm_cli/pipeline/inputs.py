"""What `map` and `embed` read: the checkpoint, and the ground of a city or of files given in its place."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsosm_cli.errors import MissingError, NoFileError, UsageError
from rsosm_cli.geometry import Projection, utm_crs
from rsosm_cli.workspace import CityFiles, Workspace, file_stamp, provenance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from shapely import Geometry

    from rsosm_cli.imagery.reader import ImageReader
    from rsosm_cli.models.checkpoint import Description

log = logging.getLogger("rsosm")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint, how it came to be chosen, and what it says of itself."""

    folder: Path
    name: str
    note: str
    description: Description

    def stamps(self) -> list[dict[str, Any]]:
        return [file_stamp(file) for file in sorted(self.folder.glob("model.*"))]


def choose_checkpoint(space: Workspace, checkpoint: Path | None, kinds: Callable[[], Path]) -> Chosen:
    """Return the checkpoint given, else the run that ``kinds`` finds."""
    from rsosm_cli.models.checkpoint import find_checkpoint, read_description

    if checkpoint is None:
        path = kinds()
        note = f"The checkpoint is the run {path.name}, the newest that fits under {space.root}."
    else:
        path = checkpoint
        note = f"The checkpoint is {path}."
    folder = find_checkpoint(path)
    name = folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name
    return Chosen(folder, name, note, read_description(folder))


@dataclass(frozen=True)
class GroundFiles:
    """The files of a piece of ground. ``name`` goes into titles; ``imagery`` and ``osm`` where they are there."""

    name: str
    imagery: Path | None
    osm: Path | None
    place: Geometry  # WGS 84
    place_stamp: Any
    manifest: Mapping[str, Any]  # of the city; empty where files are given
    own: tuple[str, ...]  # which of imagery, osm the user gave
    admin_level: int | None = None  # of the place, where it is an administrative area

    @property
    def projection_crs(self) -> str:
        return utm_crs(self.place)

    def sources(self, *, image: bool, osm: bool) -> list[dict[str, Any]]:
        """Return name, licence and attribution of what is used; what the user gave is named by its file."""
        from rsosm_cli.places.place import OSM_SOURCE

        known: list[dict[str, Any]] = [dict(s) for s in provenance(self.manifest)]
        is_osm = [s.get("name") == OSM_SOURCE["name"] for s in known]
        found = [s for s, yes in zip(known, is_osm, strict=True) if yes and osm and "osm" not in self.own]
        if osm and not found:
            found = [dict(OSM_SOURCE)]
        if image and self.imagery is not None:
            images = [s for s, yes in zip(known, is_osm, strict=True) if not yes and "imagery" not in self.own]
            found += images or [
                {"name": self.imagery.name, "licence": "", "attribution": f"Imagery: {self.imagery.name}"}
            ]
        return found

    def when(self) -> datetime.datetime:
        """Return when the ground was fetched; of files given, when the newest of them was written."""
        steps = self.manifest.get("steps", {})
        for step in ("fetch:imagery", "fetch:osm", "fetch"):
            if said := steps.get(step, {}).get("finished"):
                return datetime.datetime.strptime(said, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.UTC)
        newest = max(path.stat().st_mtime for path in (self.imagery, self.osm) if path is not None)
        return datetime.datetime.fromtimestamp(int(newest), datetime.UTC)


def find_ground(
    space: Workspace, city: str | None, *, imagery: Path | None, osm: Path | None, place: Path | None
) -> GroundFiles:
    """Return the files of ``city``, those given in place of any of them; without a place, the imagery's box."""
    files: CityFiles | None = space.city(city) if city is not None else None
    manifest = files.manifest.read() if files is not None else {}
    own = tuple(name for name, path in (("imagery", imagery), ("osm", osm)) if path is not None)
    for path, what in ((imagery, "imagery"), (osm, "OSM elements"), (place, "boundary")):
        if path is not None and not path.exists():
            raise NoFileError(f"There is no {what} {path}.", hint="Check the path.")
    if files is not None:
        imagery = imagery or (files.imagery if files.imagery.exists() else None)
        osm = osm or (files.osm if files.osm.exists() else None)
    name = str(manifest.get("name") or city or (place or imagery or Path("map")).stem)
    if city is not None and place is None and imagery is None:
        space.place_of(city)
    geometry, stamp = _place(name, files, place, imagery)
    level = None
    if place is None and files is not None and files.place.exists():
        from rsosm_cli.places.place import read_place

        level = read_place(files.place).admin_level
    return GroundFiles(name, imagery, osm, geometry, stamp, manifest, own, level)


def _place(name: str, files: CityFiles | None, place: Path | None, imagery: Path | None) -> tuple[Geometry, Any]:
    import shapely

    from rsosm_cli.geometry import WGS84
    from rsosm_cli.places.given import place_of_file
    from rsosm_cli.places.place import read_place

    if place is not None:
        return place_of_file(name, place).geometry, file_stamp(place)
    if files is not None and files.place.exists():
        return read_place(files.place).geometry, file_stamp(files.place)
    if imagery is not None:
        from rsosm_cli.imagery.reader import ImageReader

        with ImageReader(imagery, (1,)) as reader:
            bounds = reader.bounds_in(WGS84)
        return shapely.box(*bounds), list(bounds)
    raise UsageError("No ground is named.", hint="Name a --city, or give --imagery, --osm and --place.")


def need_image(ground: GroundFiles, description: Description) -> Path:
    """Return the imagery. Raises :class:`MissingError` where there is none though the checkpoint looks at it, and
    :class:`UsageError` where it lacks a band.
    """
    if ground.imagery is None:
        raise MissingError(
            f"There is no imagery of {ground.name}, and the checkpoint looks at images.",
            hint=f'Add it with `rsosm fetch --city "{ground.name}" --imagery FILE`, or give --imagery.',
        )
    from rsosm_cli.imagery.reader import ImageReader

    with ImageReader(ground.imagery, (1,)) as reader:
        count = reader.count
    missing = [band for band in description.bands if band > count]
    if missing:
        raise UsageError(
            f"The checkpoint wants bands {_listed(description.bands)}, and {ground.imagery.name} has {count}.",
            hint="Choose a checkpoint that was trained on this kind of imagery, or imagery with these bands.",
            bands=list(description.bands),
            there=count,
        )
    return ground.imagery


def need_osm(ground: GroundFiles) -> Path:
    if ground.osm is None:
        raise MissingError(
            f"There are no OSM elements of {ground.name}, and the checkpoint reads them.",
            hint=f'Run `rsosm fetch --city "{ground.name}"`, or give --osm.',
        )
    return ground.osm


def _listed(bands: tuple[int, ...]) -> str:
    return ", ".join(map(str, bands))


def torch_device(device: str) -> torch.device:
    """Return the one device that ``auto``, ``cpu``, ``cuda`` or ``mps`` means here."""
    import torch

    from rsosm_cli.training.devices import choose

    return torch.device(choose(gpus=None, device=device).accelerator)


@contextmanager
def opened_image(path: Path | None, bands: tuple[int, ...], shape_px: tuple[int, int]) -> Iterator[ImageReader | None]:
    """Open imagery with a cache for ``shape_px`` (rows, columns) at a time; None where there is none."""
    from rsosm_cli.imagery.reader import ImageReader, cache_mb_of

    if path is None:
        yield None
        return
    with ImageReader(path, bands, cache_mb=cache_mb_of(shape_px, len(bands)), gdal_cache_mb=64) as reader:
        yield reader


def projection_of(ground: GroundFiles, gsd_m: float) -> Projection:
    return Projection(ground.projection_crs, gsd_m)
