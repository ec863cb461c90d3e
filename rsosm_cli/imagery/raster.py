"""What a user's raster is: CRS, lattice, bands, what says which pixels are missing, its licence."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError  # as in cog.py: there is no public name for it
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning, RasterioError
from rasterio.warp import transform_bounds

from rsosm_cli.client import TRUST, UNVERIFIED, authorities
from rsosm_cli.errors import MissingError, RsosmError, SourceError
from rsosm_cli.imagery.sources import address_of
from rsosm_cli.units import rough

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

log = logging.getLogger("rsosm")
T = TypeVar("T")
# What says that pixels are missing: a nodata value; a mask, or an alpha band that GDAL takes for one; an alpha band
# that it forgets; numbers that may be NaN; colours of a palette that may be clear.
Missing = Literal["nodata", "mask", "alpha", "nan", "palette"]

_MOST_BYTES = 64 << 20  # of a block that is read only to see whether it can be
_OPAQUE = {"uint8": 255, "uint16": 65535}  # the types of alpha that GDAL knows, too
_HALF = 128  # of 255: what is less transparent counts as image
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
    "|NoSuch|AccessDenied|SSL certificate|[Cc]redential|Range downloading not supported"
)


@dataclass(frozen=True)
class Raster:
    """A raster as far as its header tells. ``bands`` are the numbers (from 1) of its bands that are not alpha.

    Of a raster with a palette (``palette``) they are 1, 2, 3 for red, green and blue, and ``dtype`` is theirs.
    ``alpha``: the number of the alpha band and the factor that makes 255 of its opaque, where ``missing`` names it.
    ``grey``: whether its one band says that it holds grey levels. ``clear``: the number of an alpha band of any kind
    that follows the bands of image; ``opaque``: whether it is read as one of them, and makes nothing transparent.
    """

    path: str
    crs: str
    transform: Affine
    width: int
    height: int
    bands: tuple[int, ...]
    dtype: str
    missing: tuple[Missing, ...]
    lossy: bool
    licence: str
    attribution: str
    overviews: tuple[int, ...] = ()  # their factors
    overview: int | None = None  # the one that stands for the raster
    palette: bool = False
    alpha: tuple[int, float] | None = None
    grey: bool = False
    clear: int | None = None
    opaque: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The numbers of the bands as the file has them."""
        return (1,) if self.palette else self.bands

    def with_bands(self, numbers: Sequence[int]) -> Raster:
        """Return the raster with some of its bands, counted from 1; an alpha band that is among them becomes image."""
        if self.clear is None or self.clear not in numbers:
            return replace(self, bands=tuple(self.bands[number - 1] for number in numbers))
        its = "alpha" if "alpha" in self.missing else "mask"  # what it does to image; the other is of its own
        missing = tuple(m for m in self.missing if m != its)
        return replace(self, bands=tuple(numbers), missing=missing, alpha=None, opaque=True)

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
        try:
            return rasterio.open(path, **options)
        except RasterioError as error:
            if address_of(path) == path or not re.search(_LACKING, str(error)):
                raise
        # Drivers look for files beside what is no raster of theirs; the last word may be of these. GeoTIFF's does not.
        return rasterio.open(path, **{**options, "driver": "GTiff"})


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
            log.info("%s cannot be read; next try in %s.", name, rough(wait))
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def read_pixels(
    source: DatasetReader, bands: list[int], *, opaque: bool = False, **options: Any
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return pixels (C, H, W) and where there is image (H, W); ``options`` as rasterio's ``read`` has them.

    ``bands`` and ``opaque`` as :class:`Raster` has them. Image has a pixel that is not nodata in all bands, has a
    number in each, and is not transparent. Raises :class:`SourceError` where the raster is damaged, or its server does
    not give all of it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NodataShadowWarning)  # of an alpha band beside: it is looked at below
            if _has_palette(source):
                colours = _colours(source)[source.read(1, **options)]  # (H, W, 4)
                pixels = np.moveaxis(colours[..., [band - 1 for band in bands]], -1, 0)
                valid = (source.read_masks(1, **options) > 0) & (colours[..., 3] >= _HALF)
            elif opaque and any(MaskFlags.alpha in flags for flags in source.mask_flag_enums):
                pixels = source.read(bands, **options)
                valid = np.ones(pixels.shape[1:], bool)
            else:
                pixels, valid = source.read(bands, **options), source.read_masks(bands, **options).any(axis=0)
        if np.issubdtype(pixels.dtype, np.inexact):
            valid &= np.isfinite(pixels).all(axis=0)
        if not opaque and (alpha := _forgotten_alpha(source)) is not None:
            one = {**options, "out_shape": options["out_shape"][1:]} if "out_shape" in options else options
            valid &= source.read(alpha[0], **one) * alpha[1] >= _HALF
        return pixels, valid
    except RasterioError as error:
        raise _unread(source.name, error) from None


def _has_palette(source: DatasetReader) -> bool:
    """Whether the one band of a raster (alpha aside) holds numbers of colours."""
    kinds = [kind for kind in source.colorinterp if kind != ColorInterp.alpha]
    return kinds == [ColorInterp.palette] and source.dtypes[0] in ("uint8", "uint16")


def _colours(source: DatasetReader) -> NDArray[np.uint8]:
    """Return the red, green, blue, alpha of every number that a pixel of a raster with a palette can have."""
    table = np.zeros((np.iinfo(source.dtypes[0]).max + 1, 4), np.uint8)
    for number, colour in source.colormap(1).items():
        table[number] = colour
    return table


def _forgotten_alpha(source: DatasetReader) -> tuple[int, float] | None:
    """Return an alpha band that GDAL makes no mask of, and the factor that makes 255 of its opaque.

    It forgets alpha beside a nodata value, and where there are not just one or three bands of image.
    """
    if any(MaskFlags.alpha in flags for flags in source.mask_flag_enums):
        return None
    for number, kind in enumerate(source.colorinterp, 1):
        if kind == ColorInterp.alpha and source.dtypes[number - 1] in _OPAQUE:
            return number, 255 / _OPAQUE[source.dtypes[number - 1]]
    return None


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
_LACKING = f"NoSuchKey|{_GONE}|response code: ?404|HTTP error code: ?404"
_REFUSALS = (
    ("SSL certificate", UNVERIFIED, f"{TRUST[0].upper()}{TRUST[1:]}."),
    (r"code: ?3\d\d", "its server redirects in a circle", "Check the address in a browser."),
    ("NoSuchBucket", "there is no such bucket", "Check the address."),
    (_LACKING, "there is no such file", "Check the address."),
    ("not recognized", "it is not a raster", "Check the address in a browser."),
    (
        "Range downloading not supported",
        "its server gives whole files alone, and a raster is read in parts (HTTP range requests)",
        "Download the raster and name the file.",
    ),
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
    """Return what the header of a raster tells; raises :class:`SourceError` where it is no image of the ground."""
    try:
        return _inspect(path)
    except CPLE_BaseError as error:  # of a part of the header behind a cut, which rasterio does not make its own error
        if not Path(path).is_file():
            raise  # behind an address it may be read at the next try
        raise SourceError(f"{path} is damaged: {error}.", hint="Copy or download it again.", path=path) from error


def _inspect(path: str) -> Raster:
    with open_raster(path) as source:
        _check_ground(source, path)
        alpha = [i for i, c in enumerate(source.colorinterp, 1) if c == ColorInterp.alpha]
        stored = tuple(i for i in source.indexes if i not in alpha)
        if not stored:
            raise SourceError(f"{path} holds no image bands.", path=path)
        kinds = [source.dtypes[i - 1] for i in stored]
        if (odd := next((kind for kind in kinds if kind.startswith("complex")), None)) is not None:
            raise SourceError(
                f"{path} holds complex numbers ({odd}), which are no image.",
                hint=f"Make one of it: gdal_translate DERIVED_SUBDATASET:AMPLITUDE:{Path(path).name} amplitude.tif",
                path=path,
            )
        palette = _has_palette(source)
        flags = [source.mask_flag_enums[i - 1] for i in stored]
        missing: list[Missing] = []
        if any(MaskFlags.nodata in f for f in flags):
            missing.append("nodata")
        elif any(MaskFlags.per_dataset in f for f in flags):
            missing.append("mask")
        if (forgotten := _forgotten_alpha(source)) is not None:
            missing.append("alpha")
        if any(np.issubdtype(kind, np.inexact) for kind in kinds):
            missing.append("nan")
        if palette and any(colour[3] < 255 for colour in source.colormap(1).values()):
            missing.append("palette")
        tags = source.tags()
        compression = str(source.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", ""))
        return Raster(
            path=path,
            crs=_crs_text(source),
            transform=source.transform,
            width=source.width,
            height=source.height,
            bands=(1, 2, 3) if palette else stored,
            dtype="uint8" if palette else str(np.result_type(*kinds)),
            missing=tuple(missing),
            lossy="JPEG" in compression.upper() or source.driver in {"JPEG", "WEBP", "JP2OpenJPEG"},
            licence=" ".join(str(tags.get("TIFFTAG_COPYRIGHT", "")).split()),
            attribution=" ".join(str(tags.get("TIFFTAG_ARTIST", "")).split()),
            # Asking a VRT opens its rasters, and one that is gone would then read as empty without an error.
            overviews=() if source.driver == "VRT" else tuple(source.overviews(stored[0])),
            palette=palette,
            alpha=forgotten,
            clear=alpha[0] if alpha == [len(stored) + 1] and not palette else None,
            grey=[source.colorinterp[i - 1] for i in stored] == [ColorInterp.gray],
        )


def _check_ground(source: DatasetReader, path: str) -> None:
    """Raise :class:`SourceError` where the header of a raster does not say where its pixels are."""
    if source.transform == Affine.identity():
        by = "control points (GCPs)" if source.gcps[0] else "a sensor model (RPCs)" if source.rpcs is not None else ""
        if by:
            raise SourceError(
                f"{path} has {by} alone to say where it is, and no grid on the ground.",
                hint="Warp it first, for example: gdalwarp -t_srs EPSG:32645 FILE warped.tif",
                path=path,
            )
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


def _crs_text(source: DatasetReader) -> str:
    code = source.crs.to_epsg()
    return f"EPSG:{code}" if code else str(source.crs.to_wkt())
