"""What a user's raster is: CRS, lattice, bands, which pixels are missing, its licence; and a VRT that puts it in order.

Every raster is looked at through a small VRT of 8-bit bands with an alpha band last, whatever says in the raster
itself which pixels are missing (nodata value, mask, alpha). Nothing is copied.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from xml.sax.saxutils import escape

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # as in xyz.py: there is no public name for it
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform_bounds

from rsosm_cli.client import TRUST, UNVERIFIED, authorities
from rsosm_cli.errors import MissingError, RsosmError, SourceError, UsageError
from rsosm_cli.imagery.sources import address_of

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

log = logging.getLogger("rsosm")
T = TypeVar("T")
Stretch = tuple[tuple[float, float], ...]

# Side of the reduced picture from which the stretch of a raster that is not 8-bit is taken, in pixels.
_SAMPLE_PX = 1024
# Rasters that contribute to the stretch of a mosaic: more would only slow the start.
_SAMPLE_RASTERS = 64
_PERCENTILES = (2.0, 98.0)
_MOST_BYTES = 64 << 20  # of a block that is read only to see whether it can be
# Rasters behind an address: no endless wait, and a few tries.
GDAL_NETWORK = {
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_TIMEOUT": 60,
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
}
# GDAL keeps what a server said, errors and pages in place of a raster too: this makes it ask anew.
AFRESH = {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/"}
TRIES = 3
FIRST_WAIT_S = 2.0  # doubled from try to try
# What it says where another try by us is in vain: refusals, and what it has tried again itself or waited long for.
_FINAL = (
    r"code: ?(?!406)\d{3}|(HTTP/\S+|status) (?!406)\d{3}|timed? ?out|too slow"
    "|NoSuch|AccessDenied|SSL certificate|[Cc]redential"
)


@dataclass(frozen=True)
class Raster:
    """A raster as far as its header tells. ``bands`` are the numbers (from 1) of its bands that are not alpha."""

    path: str
    crs: str
    transform: Affine
    width: int
    height: int
    bands: tuple[int, ...]
    dtype: str
    missing: Literal["none", "mask", "nodata"]
    lossy: bool
    licence: str
    attribution: str
    overviews: tuple[int, ...] = ()  # their factors
    overview: int | None = None  # the one that stands for the raster

    def at_overview(self, level: int) -> Raster:
        """Return the raster as its overview ``level`` (from 0): larger pixels on the same ground."""
        width, height = (-(-side // self.overviews[level]) for side in (self.width, self.height))
        x, y, t = self.width / width, self.height / height, self.transform
        larger = Affine(t.a * x, t.b * y, t.c, t.d * x, t.e * y, t.f)
        return replace(self, transform=larger, width=width, height=height, overview=level)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in its own CRS (of a rotated raster: the box around it)."""
        t = self.transform
        columns, rows = np.array([0, self.width, 0, self.width]), np.array([0, 0, self.height, self.height])
        x, y = t.a * columns + t.b * rows + t.c, t.d * columns + t.e * rows + t.f
        return float(x.min()), float(y.min()), float(x.max()), float(y.max())

    @property
    def upright(self) -> bool:
        """Whether rows run west to east and columns north to south, as a VRT mosaic needs."""
        t = self.transform
        return t.b == 0 and t.d == 0 and t.a > 0 and t.e < 0

    def bounds_wgs84(self) -> tuple[float, float, float, float]:
        return transform_bounds(self.crs, "EPSG:4326", *self.bounds, densify_pts=21)


def network() -> dict[str, Any]:
    """Return GDAL's options for what lies behind addresses. rasterio brings authorities; the user's come first."""
    bundle = authorities()
    return GDAL_NETWORK | ({"GDAL_CURL_CA_BUNDLE": bundle} if bundle else {})


def open_raster(path: str, *, afresh: bool = False, **options: Any) -> DatasetReader:
    """Open a raster, with ``options`` of its driver; ``afresh``: whatever GDAL knows of it from its server.

    Raises :class:`MissingError` or :class:`SourceError` in place of GDAL's errors.
    """
    name = address_of(path)
    if name != path:
        return patiently(name, lambda again: _opened(path, afresh or again, options), _refusal)
    try:
        return _opened(path, False, options)
    except RasterioError as error:
        detail = " ".join(str(error).split()).rstrip(".")
        if re.search(_GONE, detail):
            raise MissingError(f"There is no raster {path}.", path=path) from None
        known = "" if "not recognized" in detail else f": {detail}"
        raise SourceError(
            f"{path} is not a raster that GDAL can read{known}.",
            hint="Imagery is a GeoTIFF, or another raster that has a position on the ground.",
            path=path,
        ) from None


def _opened(path: str, afresh: bool, options: dict[str, Any]) -> DatasetReader:
    with warnings.catch_warnings(), rasterio.Env(**network(), **(AFRESH if afresh else {})):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # said in a sentence of ours
        return rasterio.open(path, **options)


def patiently(name: str, work: Callable[[bool], T], failed: Callable[[str, Exception], Exception]) -> T:
    """Return what ``work`` does with a raster behind an address, tried again where that may help.

    ``work`` is told whether GDAL is to ask anew. ``failed`` makes the error of the raster's name and the last one.
    """
    for attempt in range(TRIES):
        try:
            return work(attempt > 0)
        except (RasterioError, CPLE_BaseError, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            if isinstance(error, RsosmError):
                raise
            if attempt == TRIES - 1 or re.search(_FINAL, " ".join(_chain(error))):
                raise failed(name, error) from None
            wait = FIRST_WAIT_S * 2**attempt
            log.info("%s cannot be read; next try in %.0f s.", name, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def read_pixels(source: DatasetReader, bands: list[int], **options: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return pixels (C, H, W) and where any of the bands has image (H, W); ``options`` as rasterio's ``read`` has them.

    Raises :class:`SourceError` where the raster is damaged, or its server does not give all of it.
    """
    try:
        return source.read(bands, **options), source.read_masks(bands, **options).any(axis=0)
    except RasterioError as error:
        raise _unread(source.name, error) from None


def check_remote(path: str) -> None:
    """Read the last pixels of a GeoTIFF behind an address: of a half one, the head alone opens.

    Raises :class:`SourceError`.
    """

    def read(again: bool) -> None:
        with open_raster(path, afresh=again) as source, rasterio.Env(**network()):
            height, width = source.block_shapes[0]
            if source.driver == "GTiff" and height * width * np.dtype(source.dtypes[0]).itemsize <= _MOST_BYTES:
                row, col = (source.height - 1) // height * height, (source.width - 1) // width * width
                source.read(source.count, window=((row, source.height), (col, source.width)))

    patiently(address_of(path), read, lambda name, error: _unread(path, error))


def _unread(path: str, error: Exception) -> SourceError:
    name, said = address_of(path), " ".join(_chain(error))
    if name != path and not re.search(_GARBLED, said, re.IGNORECASE):
        return _not_given(name, said)
    return SourceError(
        f"{name} is damaged: some of its pixels cannot be read.", hint="Copy or download it again.", path=path
    )


def _refusal(name: str, error: Exception) -> SourceError:
    return _not_given(name, " ".join(str(error).split()).rstrip("."))


def _chain(error: BaseException | None) -> Iterator[str]:
    """Yield what an error says and those that it comes from: the last word is of who read the bytes."""
    while error is not None:
        yield str(error)
        error = error.__cause__


# What the bytes are blamed for, not who gives them: "ZIPDecode:Decoding error at scanline 256".
_GARBLED = "decod(e|ing) ?error|corrupt|JPEGLib"
# Versions of GDAL differ; one says of a missing file that it "is not recognized", too.
_GONE = "No such file|does not exist in the file system"
# What GDAL says of a raster behind an address -> what it means, and what to do.
_REFUSALS = (
    ("SSL certificate", UNVERIFIED, f"{TRUST[0].upper()}{TRUST[1:]}."),
    (r"code: ?3\d\d", "its server redirects in a circle", "Check the address in a browser."),
    ("NoSuchBucket", "there is no such bucket", "Check the address."),
    (f"NoSuchKey|{_GONE}|response code: ?404|HTTP error code: ?404", "there is no such file", "Check the address."),
    ("not recognized", "it is not a raster", "Check the address in a browser."),
    (
        "AccessDenied|response code: ?40[13]|error code: ?40[13]|InvalidAccessKeyId|SignatureDoesNotMatch",
        "access is refused",
        "Give credentials as GDAL takes them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE).",
    ),
    (
        "not defined|InvalidCredentials|credentials",
        "there are no credentials for it",
        "Give them as GDAL takes them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), or "
        "AWS_NO_SIGN_REQUEST=YES where it is public.",
    ),
)


def _not_given(address: str, detail: str) -> SourceError:
    """Return the error for a raster behind an address; GDAL's own words may hold the address with what it holds."""
    for pattern, words, hint in _REFUSALS:
        if re.search(pattern, detail, re.IGNORECASE):
            return SourceError(f"{address} cannot be read: {words}.", hint=hint, path=address)
    code = re.search(r"code: ?(\d{3})|^(\w{1,60})$", detail)
    said = f" ({code[1] or code[2]})" if code else ""
    return SourceError(
        f"{address} cannot be read: its server does not give it{said}.", hint="Check the address, or try later.",
        path=address,
    )  # fmt: skip


def inspect(path: str) -> Raster:
    """Return what the header of a raster tells; raises :class:`SourceError` where it lies nowhere on the ground."""
    with open_raster(path) as source:
        if source.crs is None:
            raise SourceError(
                f"{path} has no coordinate reference system.",
                hint="Give it one, for example: gdal_edit.py -a_srs EPSG:32645 FILE",
                path=path,
            )
        if source.transform == Affine.identity():
            raise SourceError(
                f"{path} has a coordinate reference system, but no position on the ground (no geotransform).",
                hint="Georeference it, for example with gdal_translate -a_ullr or gdalwarp.",
                path=path,
            )
        alpha = [i for i, c in enumerate(source.colorinterp, 1) if c == ColorInterp.alpha]
        bands = tuple(i for i in source.indexes if i not in alpha)
        if not bands:
            raise SourceError(f"{path} holds no image bands.", path=path)
        flags = [source.mask_flag_enums[i - 1] for i in bands]
        missing: Literal["none", "mask", "nodata"] = "none"
        if any(MaskFlags.nodata in f for f in flags):
            missing = "nodata"
        elif alpha or any(MaskFlags.per_dataset in f for f in flags):
            missing = "mask"
        tags = source.tags()
        compression = str(source.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", ""))
        return Raster(
            path=path,
            crs=_crs_text(source),
            transform=source.transform,
            width=source.width,
            height=source.height,
            bands=bands,
            dtype=str(np.result_type(*[source.dtypes[i - 1] for i in bands])),
            missing=missing,
            lossy="JPEG" in compression.upper() or source.driver in {"JPEG", "WEBP", "JP2OpenJPEG"},
            licence=" ".join(str(tags.get("TIFFTAG_COPYRIGHT", "")).split()),
            attribution=" ".join(str(tags.get("TIFFTAG_ARTIST", "")).split()),
            # Asking a VRT opens its rasters, and one that is gone would then read as empty without an error.
            overviews=() if source.driver == "VRT" else tuple(source.overviews(bands[0])),
        )


def _crs_text(source: DatasetReader) -> str:
    code = source.crs.to_epsg()
    return f"EPSG:{code}" if code else str(source.crs.to_wkt())


def stretch_of(rasters: Sequence[Raster], bands: int) -> Stretch | None:
    """Return (low, high) of each band for 8 bits, percentiles 2 and 98 over all rasters; None where all are 8-bit.

    One stretch for a whole mosaic: one a raster would show as steps of brightness at the joints.
    """
    if all(r.dtype == "uint8" for r in rasters):
        return None
    step = max(1, -(-len(rasters) // _SAMPLE_RASTERS))
    samples: list[list[np.ndarray]] = [[] for _ in range(bands)]
    for raster in rasters[::step]:
        with open_raster(raster.path) as source:
            factor = max(1.0, max(source.width, source.height) / _SAMPLE_PX)
            shape = (max(1, round(source.height / factor)), max(1, round(source.width / factor)))
            indexes = list(raster.bands[:bands])
            pixels, valid = read_pixels(source, indexes, out_shape=(bands, *shape))
        valid &= np.isfinite(pixels).all(axis=0)
        for band in range(bands):
            samples[band].append(pixels[band][valid].astype(np.float64))
    ranges = []
    for values in samples:
        joined = np.concatenate(values)
        low, high = np.percentile(joined, _PERCENTILES) if len(joined) else (0.0, 1.0)
        ranges.append((float(low), float(high if high > low else low + 1)))
    return tuple(ranges)


def check_bands(path: str, available: int, wanted: Sequence[int]) -> None:
    """Raise :class:`UsageError` where a raster has not the bands wanted (counted from 1)."""
    beyond = [b for b in wanted if not 1 <= b <= available]
    if beyond or not wanted:
        has = "1 band" if available == 1 else f"{available} bands"
        what = f"band {beyond[0]} is" if beyond else "no band is"
        raise UsageError(
            f"{path} has {has}, and {what} asked for.",
            hint=f"Choose among 1 to {available} with --bands (a band may be repeated: --bands 1,1,1).",
            path=path,
            bands=list(wanted),
        )


def ordered_vrt(raster: Raster, bands: Sequence[int], stretch: Stretch | None, mask: str | None = None) -> str:
    """Return VRT XML of a raster on its own lattice: ``bands`` (places in ``raster.bands``, from 0) and alpha.

    ``mask`` is a one-band raster on the same lattice, 0 where the image is missing; default: what the raster says.
    """
    size = f'xSize="{raster.width}" ySize="{raster.height}"'
    rect = f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/>'
    parts = [vrt_head(raster.crs, raster.transform, raster.width, raster.height)]
    name = source_name(raster.path)
    if raster.overview is not None:
        name += f'<OpenOptions><OOI key="OVERVIEW_LEVEL">{raster.overview}</OOI></OpenOptions>'
    for number, place in enumerate(bands, 1):
        source = name + f"<SourceBand>{raster.bands[place]}</SourceBand>{rect}"
        if stretch is None:
            body = f"<SimpleSource>{source}</SimpleSource>"
        else:
            low, high = stretch[place]
            ratio = 255.0 / (high - low)
            scale = f"<ScaleOffset>{-low * ratio!r}</ScaleOffset><ScaleRatio>{ratio!r}</ScaleRatio>"
            body = f"<ComplexSource>{source}{scale}</ComplexSource>"
        parts.append(f'<VRTRasterBand dataType="Byte" band="{number}">{body}</VRTRasterBand>')
    if mask is not None:
        alpha = f"<SimpleSource>{source_name(mask)}<SourceBand>1</SourceBand>{rect}</SimpleSource>"
    elif raster.missing == "nodata":
        # Missing is a pixel that has the nodata value in every band: black in one of them is a colour.
        alpha = "".join(
            f"<ComplexSource>{name}<SourceBand>mask,{b}</SourceBand>{rect}<NODATA>0</NODATA></ComplexSource>"
            for b in raster.bands
        )
    else:
        band = f"<SourceBand>mask,{raster.bands[0]}</SourceBand>"
        alpha = f"<SimpleSource>{name}{band}{rect}</SimpleSource>"
    parts.append(alpha_band(len(bands) + 1, alpha))
    return "".join([*parts, "</VRTDataset>"])


def vrt_head(crs: str, transform: Affine, width: int, height: int) -> str:
    gdal = ", ".join(repr(float(v)) for v in transform.to_gdal())
    # Axis mapping 2: x first, whatever order the authority of the CRS prescribes.
    srs = f"<SRS>{escape(rasterio.crs.CRS.from_user_input(crs).to_wkt())}</SRS>"
    return f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{srs}<GeoTransform>{gdal}</GeoTransform>'


def source_name(path: str, relative: bool = False) -> str:
    return f'<SourceFilename relativeToVRT="{int(relative)}" shared="0">{escape(path)}</SourceFilename>'


def alpha_band(number: int, sources: str) -> str:
    return f'<VRTRasterBand dataType="Byte" band="{number}"><ColorInterp>Alpha</ColorInterp>{sources}</VRTRasterBand>'
