"""Images of a STAC API (``stac:ADDRESS#COLLECTION``) -> one raster: the least cloudy on top, or their median.

The pixels are read with odc-stac in windows. Each window is kept as a file of its own, so that an interrupted run goes
on, until all are one raster.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.address import host_of
from rsosm_cli.client import TRUST, UNVERIFIED, Client
from rsosm_cli.errors import SourceError, UsageError
from rsosm_cli.geometry import utm_crs
from rsosm_cli.imagery.raster import AFRESH, network, patiently
from rsosm_cli.imagery.stac_search import clouds, search
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import atomic, fingerprint, locked, require_space

if TYPE_CHECKING:
    import pystac
    from shapely import Geometry

log = logging.getLogger("rsosm")

_WINDOW_PX = 1024
_ORDER = "RSOSM_IMAGES"  # tag of a raster: what it was made of
_STACK_BYTES = 64 << 20  # of a band of all images whose median is taken at a time
_COLOURS = ("red", "green", "blue")
_DEFAULT_GSD_M = 10.0
# Rasters behind an address: no endless wait, a few tries, and an end to what drips.
_GDAL: dict[str, Any] = {
    "GDAL_HTTP_CONNECTTIMEOUT": "10",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_LOW_SPEED_TIME": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1024",
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_DELAY": "1",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
}


@dataclass(frozen=True)
class Composed:
    """What became of a collection: the raster's notes and credit, and how many images are in it."""

    notes: list[str]
    credit: dict[str, str]
    images: int
    size_bytes: int


def is_stac(source: str) -> bool:
    """Return whether a source names a collection."""
    return source.startswith("stac:")


def bands_of(item: pystac.Item, wanted: Sequence[int | str] | None) -> list[str]:
    """Return the bands to read: those wanted, by asset or common name; else red, green and blue; else ``visual``."""
    assets = dict(item.assets)
    common = set()
    for asset in assets.values():
        for band in asset.extra_fields.get("eo:bands", []) + asset.extra_fields.get("bands", []):
            common.add(band.get("common_name") or band.get("eo:common_name"))
    if wanted is not None:
        for band in map(str, wanted):
            if band not in assets and band not in common and band.partition(".")[0] not in assets:
                raise UsageError(
                    f"The images of {item.collection_id} have no band {band}.",
                    hint=f"Choose with --bands among {', '.join(sorted(assets))}.",
                )
        return [str(band) for band in wanted]
    if all(c in assets or c in common for c in _COLOURS):
        return list(_COLOURS)
    if "visual" in assets:
        return ["visual.1", "visual.2", "visual.3"]
    raise UsageError(
        f"The images of {item.collection_id} have no red, green and blue.",
        hint=f"Choose with --bands among {', '.join(sorted(assets))}.",
    )


def compose(
    source: str,
    place: Geometry,
    folder: Path,
    target: Path,
    *,
    gsd_m: float | None,
    settings: FetchSettings,
    progress: Progress = SILENT,
    client: Client | None = None,
) -> Composed:
    """Write the images of a collection over ``place`` (WGS 84) as one tiled GeoTIFF in the UTM zone of the place.

    ``folder`` keeps the finished windows. Raises :class:`SourceError`, :class:`MissingError`, :class:`UsageError`.
    """
    found = search(source, place, settings, client=client)
    items, credit = found.items, found.credit
    chosen = items if settings.stac_mosaic == "median" else _until_covered(items, place)
    bands = bands_of(chosen[0], settings.bands)
    gsd = gsd_m or min((float(i.properties["gsd"]) for i in chosen if i.properties.get("gsd")), default=_DEFAULT_GSD_M)
    box = _geobox(place, gsd)
    order = fingerprint(source, [i.id for i in chosen], bands, str(box), settings.stac_mosaic)
    log.info(
        "%d images of %s, %s of %g m.", len(chosen), credit["name"], "{1:,} x {0:,} pixels".format(*box.shape), gsd
    )
    with locked(folder, "stac.lock"):
        if not _is_made(target, order):
            _make(chosen, bands, box, folder / f"stac-{order}", target, order, settings, credit["name"], progress)
    dates = sorted(str(i.datetime.date()) for i in chosen if i.datetime is not None)
    span = f", {dates[0]} to {dates[-1]}" if dates else ""
    most = max(map(clouds, chosen))
    how = "their median" if settings.stac_mosaic == "median" else "the least cloudy on top"
    notes = [
        f"{len(chosen)} images of {credit['name']}{span}, at most {most:.0f} % of clouds, {how}: bands "
        f"{', '.join(bands)} at {gsd:g} m."
    ]
    notes += found.notes
    if len(chosen) == len(items):  # had the place been covered before the last one, more would not have mattered
        notes += found.more
    return Composed(notes, {**credit, "items": ", ".join(i.id for i in chosen)}, len(chosen), target.stat().st_size)


def _is_made(target: Path, order: str) -> bool:
    """Whether the raster is there, of the same images and pixels: a run that went on to fail later made it."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(target) as made:
            return made.tags().get(_ORDER) == order
    except RasterioError:
        return False


def _make(
    chosen: Sequence[pystac.Item], bands: list[str], box: Any, parts: Path, target: Path, order: str,
    settings: FetchSettings, name: str, progress: Progress,
) -> None:  # fmt: skip
    """Read the windows that are missing in ``parts``, and write all as ``target``."""
    height, width = box.shape
    require_space(parts, 2.0 * height * width * len(bands) * 4, f"The image of {width} x {height} pixels")
    windows = list(_windows(height, width))
    read = read_median if settings.stac_mosaic == "median" else _read
    with progress.task(f"images of {name}", len(windows), "windows") as advance:
        for top, left, bottom, right in windows:
            part = parts / f"{top}-{left}.npy"
            if not part.exists():
                pixels = read(chosen, bands, box[top:bottom, left:right], parts)
                with atomic(part) as half, half.open("wb") as file:
                    np.save(file, pixels)
            advance(1)
    _write(parts, windows, box, target, order)
    shutil.rmtree(parts)


def _until_covered(items: Sequence[pystac.Item], place: Geometry) -> list[pystac.Item]:
    """Return the least cloudy images that together cover the place; all where they do not."""
    import shapely

    chosen: list[pystac.Item] = []
    left = place
    for item in items:
        rest = shapely.difference(left, shapely.from_geojson(json.dumps(item.geometry)))
        if rest.area < left.area:
            chosen.append(item)
            left = rest
        if left.is_empty:
            break
    return chosen or list(items[:1])


def _geobox(place: Geometry, gsd: float) -> Any:
    from odc.geo.geobox import GeoBox
    from rasterio.warp import transform_bounds

    crs = utm_crs(place)
    west, south, east, north = transform_bounds("EPSG:4326", crs, *place.bounds, densify_pts=21)
    # On multiples of the pixel, as the grids of Sentinel-2 and Landsat are.
    corners = [np.floor(west / gsd) * gsd, np.floor(south / gsd) * gsd, np.ceil(east / gsd) * gsd]
    return GeoBox.from_bbox((*corners, np.ceil(north / gsd) * gsd), crs=crs, resolution=gsd, tight=True)


def _windows(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    for top in range(0, height, _WINDOW_PX):
        for left in range(0, width, _WINDOW_PX):
            yield top, left, min(top + _WINDOW_PX, height), min(left + _WINDOW_PX, width)


def _read(items: Sequence[pystac.Item], bands: list[str], box: Any, _: Path) -> NDArray[Any]:
    """Return a window (C + 1, H, W) of the first image that has a pixel; the last plane is 1 where there is image."""
    pixels: NDArray[Any] | None = None
    there = np.zeros(box.shape, bool)
    for item in items:
        image, valid = _image(item, bands, box)
        if pixels is None:
            pixels = np.zeros_like(image)
        fresh = valid & ~there
        pixels[:, fresh] = image[:, fresh]
        there |= valid
        if there.all():
            break
    assert pixels is not None
    return np.concatenate([pixels, there[None].astype(pixels.dtype)])


def read_median(items: Sequence[pystac.Item], bands: list[str], box: Any, folder: Path) -> NDArray[Any]:
    """Return a window (C + 1, H, W) of the median of all images; the last plane is 1 where there is image.

    Each image is read once and waits on the disk of ``folder``: memory does not grow with their number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    height, width = box.shape
    dtype: np.dtype[Any] | None = None
    with tempfile.TemporaryFile(dir=folder) as waiting:  # without a name: nothing is left of it, whatever happens
        for item in items:
            image, valid = _image(item, bands, box)
            dtype = dtype or image.dtype
            waiting.write(np.ascontiguousarray(image, dtype).tobytes())  # (C, H, W)
            waiting.write(valid.tobytes())  # (H, W)
        assert dtype is not None
        pixels = np.zeros((len(bands) + 1, height, width), dtype)
        plane = height * width
        record = plane * (len(bands) * dtype.itemsize + 1)

        def rows(number: int, kind: np.dtype[Any], start: int, top: int, bottom: int) -> NDArray[Any]:
            waiting.seek(number * record + start + top * width * kind.itemsize)
            return np.frombuffer(waiting.read((bottom - top) * width * kind.itemsize), kind).reshape(-1, width)

        exact = np.dtype(np.float32 if np.can_cast(dtype, np.float32) else np.float64)
        strip = max(1, _STACK_BYTES // (len(items) * width * exact.itemsize))
        stack = np.empty((min(strip, height), width, len(items)), exact)
        for top in range(0, height, strip):
            bottom = min(top + strip, height)
            part = stack[: bottom - top]
            for band in range(len(bands)):
                for number in range(len(items)):
                    valid = rows(number, np.dtype(bool), len(bands) * plane * dtype.itemsize, top, bottom)
                    values = rows(number, dtype, band * plane * dtype.itemsize, top, bottom)
                    part[..., number] = np.where(valid, values, exact.type(np.nan))
                pixels[band, top:bottom], there = _median(part, dtype)
                pixels[-1, top:bottom] = np.maximum(pixels[-1, top:bottom], there)
    return pixels


def _median(stack: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the median of a stack (H, W, N) over its numbers, 0 where it has none, and where it has; it is sorted."""
    stack.sort(axis=-1)  # NaN comes last
    count = np.count_nonzero(~np.isnan(stack), axis=-1)[..., None]
    low = np.take_along_axis(stack, np.maximum(count - 1, 0) // 2, axis=-1)[..., 0]
    high = np.take_along_axis(stack, np.minimum(count // 2, stack.shape[-1] - 1), axis=-1)[..., 0]
    there = count[..., 0] > 0
    middle = np.where(there, (low + high) / 2, 0)
    return (np.rint(middle) if dtype.kind in "iu" else middle).astype(dtype), there


def _image(item: pystac.Item, bands: list[str], box: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return one image in a window, (C, H, W), and where it has pixels: not its nodata value (0 where it has none)."""
    import odc.stac

    for name in ("odc", "rasterio"):  # they log the addresses of images, which may be signed
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def load(again: bool) -> tuple[list[NDArray[Any]], list[float]]:
        odc.stac.configure_rio(**(network() | _GDAL | (AFRESH if again else {})))
        loaded = odc.stac.load([item], bands=bands, geobox=box, groupby="id", resampling="bilinear")
        planes = [np.asarray(loaded[band].isel(time=0).values) for band in bands]
        return planes, [loaded[band].attrs.get("nodata", 0) for band in bands]

    planes, empty = patiently(f"The image {item.id} of {_servers(item)}", load, _unread)
    image = np.stack(planes)
    missing = np.all([np.isnan(p) if np.isnan(e) else p == e for p, e in zip(planes, empty, strict=True)], axis=0)
    return image, ~missing


def _servers(item: pystac.Item) -> str:
    """Return where the files of an image are; they need not be where the API is."""
    hosts = {host_of(asset.href) for asset in item.assets.values() if "://" in asset.href}
    return " and ".join(sorted(hosts)[:2]) or "the collection"


def _unread(name: str, error: Exception) -> SourceError:
    return SourceError(
        f"{name} cannot be read: {_said(str(error))}.",
        hint="Run the command again later: the windows read so far are kept. Are its files openly readable?",
    )


def _said(text: str) -> str:
    """Return what GDAL says about a raster behind an address, in plain words and without the address."""
    status = re.search(r"(?:HTTP (?:response code|error code)\D{0,3}|HTTP/\S+ )(\d{3})", text)
    if status is not None and status[1].startswith("3"):
        return "its server redirects in a circle"
    if status is not None:
        return f"its server answers with status {status[1]}"
    if "SSL certificate" in text:
        return f"{UNVERIFIED} ({TRUST})"
    if re.search(r"timed? ?out|too slow|transfer closed|CURL error", text, re.IGNORECASE):
        return "its server does not deliver, or not in time"
    return "a file of it is missing, broke off or is damaged"


def _write(parts: Path, windows: Sequence[tuple[int, int, int, int]], box: Any, target: Path, order: str) -> None:
    """Write the windows as one GeoTIFF with a mask of its own."""
    import rasterio

    top, left = windows[0][:2]
    first = np.load(parts / f"{top}-{left}.npy", allow_pickle=False)
    height, width = box.shape
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": len(first) - 1, "dtype": str(first.dtype),
        "crs": str(box.crs), "transform": box.transform, "tiled": True, "blockxsize": 512, "blockysize": 512,
        "compress": "DEFLATE", "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), atomic(target) as half, rasterio.open(half, "w", **profile) as out:
        out.update_tags(**{_ORDER: order})
        for top, left, bottom, right in windows:
            pixels = np.load(parts / f"{top}-{left}.npy", allow_pickle=False)
            where = ((top, bottom), (left, right))
            out.write(pixels[:-1], window=where)
            out.write_mask(pixels[-1] > 0, window=where)
