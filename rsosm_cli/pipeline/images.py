"""Whether the images of a city fit it: made for its place, of rasters that are still there."""

from __future__ import annotations

from dataclasses import dataclass

from rsosm_cli.errors import RsosmError
from rsosm_cli.places.place import Place
from rsosm_cli.workspace import CityFiles, fingerprint


@dataclass(frozen=True)
class Fault:
    """What is to be said of an image that does not fit; ``useless``: nothing of the place can be read from it."""

    note: str
    useless: bool


def ground(place: Place) -> str:
    """Return what tells the ground of a place from that of others in a record."""
    return fingerprint(place.geometry.wkb_hex)


def faults(files: CityFiles, place: Place, epoch: str | None = None) -> list[Fault]:
    """Return what is wrong with a city's image (of an epoch); nothing where it fits, or where there is none."""
    image = files.imagery_of(epoch)
    if not image.exists():
        return []
    from rsosm_cli.imagery.whole import lost  # GDAL only where there is imagery

    found = [*_made_elsewhere(files, place, epoch)]
    if (gone := lost(str(image))) is not None:
        note = f"{image.name} is made of {gone}, which is not there any more: nothing can be read from it."
        found.append(Fault(f"{note} Bring it back, or name other imagery.", True))
    return found


def _made_elsewhere(files: CityFiles, place: Place, epoch: str | None) -> list[Fault]:
    image = files.imagery_of(epoch)
    step = files.manifest.step(f"fetch:{image.stem}")
    if step.get("place", ground(place)) == ground(place):
        return []
    from rsosm_cli.imagery.prepare import covered
    from rsosm_cli.imagery.raster import inspect

    option = "" if epoch is None else f"--epoch {epoch} "
    made = f"{image.name} was made for the place as it was before and reaches over"
    try:
        share = covered([inspect(str(image))], place.geometry)
    except RsosmError as error:
        return [Fault(f"{image.name} cannot be used: {error.message}", True)]
    if share == 0:
        return [Fault(f"{made} 0 % of the present one: name other imagery with {option}--imagery SOURCE", True)]
    source = " ".join(step.get("inputs", [])) or "SOURCE"
    part = f"{100 * share:.0f} % of the present one"
    return [Fault(f"{made} {part}: fetch it anew with {option}--imagery {source}", False)]
