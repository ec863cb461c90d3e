"""Images of a STAC API (``stac:ADDRESS#COLLECTION``) -> one raster: the least cloudy on top, or their median.

The catalogue is searched with pystac-client, over the polite client of ours (bounded waits, kept answers); the pixels
are read with odc-stac in windows. Each window is kept as a file of its own, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.address import host_of
from rsosm_cli.client import TRUST, UNVERIFIED, Client
from rsosm_cli.errors import MissingError, RsosmError, SourceError, UsageError
from rsosm_cli.geometry import utm_crs
from rsosm_cli.imagery.raster import AFRESH, network, patiently
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import atomic, fingerprint, locked, require_space

if TYPE_CHECKING:
    import pystac
    from shapely import Geometry

log = logging.getLogger("rsosm")

_SOURCE = re.compile(r"stac:(https?://[^#]+)#(.+)")
_WINDOW_PX = 1024
_KEPT_S = 7 * 86_400.0  # a search: so that a run that goes on sees the same images
_PAGE = 100
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


def search(
    source: str, place: Geometry, settings: FetchSettings, *, client: Client | None = None
) -> tuple[list[pystac.Item], dict[str, str]]:
    """Return the images of a collection over ``place`` (WGS 84), the least cloudy first, and the collection's credit.

    Raises :class:`MissingError` (no such collection, no image), :class:`SourceError`, :class:`UsageError`.
    """
    import pystac
    import pystac_client
    import shapely
    from pystac_client.errors import ClientTypeError
    from pystac_client.exceptions import APIError

    match = _SOURCE.fullmatch(source)
    assert match is not None
    url, name = match[1].rstrip("/"), match[2]
    client = client or Client(
        "The STAC API", settings.contact, settings.max_wait_s, hint="Check the address, or try again later."
    )
    io = _polite_io(client)
    try:
        api = pystac_client.Client.open(url, stac_io=io)
        collection = api.get_collection(name)
        if collection is None:
            raise MissingError(f"{host_of(url)} has no collection {name}.", hint="Check its name.")
        found = api.search(
            method="GET", collections=[name], bbox=list(place.bounds), datetime=settings.stac_dates, limit=_PAGE,
            max_items=settings.stac_items,
        )  # fmt: skip
        items = [item for item in found.items() if item.geometry is not None]
    except RsosmError:
        raise
    except (
        pystac.STACError,
        APIError,
        ClientTypeError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # any other JSON
        kind = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise SourceError(
            f"The STAC API at {host_of(url)} does not answer as one ({re.sub(r'https?://[^ ]+', '...', kind)}).",
            hint="Check the address: the root of an API with search, not a static catalogue.",
        ) from None
    near = [i for i in items if shapely.intersects(shapely.from_geojson(json.dumps(i.geometry)), place)]
    clear = [i for i in near if _clouds(i) <= settings.stac_clouds]
    if not clear:
        when = f" in {settings.stac_dates}" if settings.stac_dates else ""
        least = f"; the least cloudy of {len(near)} has {min(map(_clouds, near)):.0f} %" if near else ""
        raise MissingError(
            f"{name} has no image of the place{when} with at most {settings.stac_clouds:g} % of clouds{least}.",
            hint="Widen --dates, or raise --set stac_clouds=...",
        )
    providers = ", ".join(p.name for p in collection.providers or [])
    licence = collection.license or "unknown"
    credit = {"name": collection.title or name, "licence": licence, "attribution": providers or host_of(url)}
    return sorted(clear, key=lambda i: (_clouds(i), i.id)), credit


def _clouds(item: pystac.Item) -> float:
    value = item.properties.get("eo:cloud_cover")
    return float(value) if value is not None else 0.0


def _polite_io(client: Client) -> Any:
    from pystac_client.stac_api_io import StacApiIO

    class PoliteIO(StacApiIO):
        def request(
            self,
            href: str,
            method: str | None = None,
            headers: dict[str, str] | None = None,
            parameters: dict[str, Any] | None = None,
        ) -> str:
            form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (parameters or {}).items()}
            answer = client.fetch(href, form, post=False, check=_check_json, suffix=".json", max_age_s=_KEPT_S)
            return answer.read_text(encoding="utf-8")

    return PoliteIO()


def _check_json(file: Path) -> str:
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        page = b"<html" in file.read_bytes()[:2000].lower()
        return "an HTML page instead of JSON" if page else "the answer is not JSON"
    return "" if isinstance(answer, dict) else "the answer is not a STAC document"


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
    items, credit = search(source, place, settings, client=client)
    chosen = items if settings.stac_mosaic == "median" else _until_covered(items, place)
    bands = bands_of(chosen[0], settings.bands)
    gsd = gsd_m or min((float(i.properties["gsd"]) for i in chosen if i.properties.get("gsd")), default=_DEFAULT_GSD_M)
    box = _geobox(place, gsd)
    order = [source, [i.id for i in chosen], bands, str(box), settings.stac_mosaic]
    parts = folder / f"stac-{fingerprint(*order)}"
    height, width = box.shape
    require_space(folder, 2.0 * height * width * len(bands) * 4, f"The image of {width} x {height} pixels")
    log.info("%d images of %s, %s of %g m.", len(chosen), credit["name"], f"{width:,} x {height:,} pixels", gsd)
    with locked(folder, "stac.lock"):
        windows = list(_windows(height, width))
        with progress.task(f"images of {credit['name']}", len(windows), "windows") as advance:
            for top, left, bottom, right in windows:
                part = parts / f"{top}-{left}.npy"
                if not part.exists():
                    pixels = _read(chosen, bands, box[top:bottom, left:right], settings.stac_mosaic == "median")
                    with atomic(part) as half, half.open("wb") as file:
                        np.save(file, pixels)
                advance(1)
        _write(parts, windows, box, target)
    dates = sorted(str(i.datetime.date()) for i in chosen if i.datetime is not None)
    span = f", {dates[0]} to {dates[-1]}" if dates else ""
    clouds = max(map(_clouds, chosen))
    how = "their median" if settings.stac_mosaic == "median" else "the least cloudy on top"
    notes = [
        f"{len(chosen)} images of {credit['name']}{span}, at most {clouds:.0f} % of clouds, {how}: bands "
        f"{', '.join(bands)} at {gsd:g} m."
    ]
    return Composed(notes, {**credit, "items": ", ".join(i.id for i in chosen)}, len(chosen), target.stat().st_size)


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


def _read(items: Sequence[pystac.Item], bands: list[str], box: Any, median: bool) -> NDArray[Any]:
    """Return a window (C + 1, H, W), the last plane 1 where there is image."""
    pixels: NDArray[Any] | None = None
    layers: list[NDArray[Any]] = []
    there = np.zeros(box.shape, bool)
    for item in items:
        image, valid = _image(item, bands, box)
        if median:
            layers.append(np.where(valid, image, np.nan))
            there |= valid
            pixels = image
            continue
        if pixels is None:
            pixels = np.zeros_like(image)
        fresh = valid & ~there
        pixels[:, fresh] = image[:, fresh]
        there |= valid
        if there.all():
            break
    assert pixels is not None
    if median:
        stack = np.stack(layers)  # (N, C, H, W)
        stack[:, :, ~there] = 0  # an all-NaN median warns
        middle = np.nanmedian(stack, axis=0)
        whole = np.issubdtype(pixels.dtype, np.integer)
        pixels = (np.rint(middle) if whole else middle).astype(pixels.dtype)
    return np.concatenate([pixels, there[None].astype(pixels.dtype)])


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


def _write(parts: Path, windows: Sequence[tuple[int, int, int, int]], box: Any, target: Path) -> None:
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
        for top, left, bottom, right in windows:
            pixels = np.load(parts / f"{top}-{left}.npy", allow_pickle=False)
            where = ((top, bottom), (left, right))
            out.write(pixels[:-1], window=where)
            out.write_mask(pixels[-1] > 0, window=where)
