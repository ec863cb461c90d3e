"""Many rasters as one without copying: a VRT of 8-bit bands and alpha over the user's own files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from rsosm_cli.imagery.missing import write_mask
from rsosm_cli.imagery.ordered import alpha_band, from_folder, masked_vrt, ordered_vrt, scaling, source_name, vrt_head
from rsosm_cli.imagery.raster import Raster, inspect
from rsosm_cli.imagery.stretch import Stretch, stretch_of
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.workspace import atomic, write_text

# Two lattices are one where they differ by less than this, in pixels.
_ALIGNED_PX = 0.01
_NAME_BYTES = 150
_ALPHA_IS_MASK = (1, 3)  # bands of image beside which GDAL takes alpha for a mask


@dataclass(frozen=True)
class Mosaic:
    """What was written: CRS, number of bands (alpha aside), and the stretch of rasters that are not 8-bit."""

    crs: str
    bands: int
    stretch: Stretch | None
    warped: int


def write_mosaic(
    rasters: Sequence[Raster], folder: Path, target: Path, *, nodata: int | None = None, progress: Progress = SILENT
) -> Mosaic:
    """Write ``target``, a VRT over ``rasters``; what it needs besides them goes into ``folder``.

    A caller who may yet refuse it, or fail, has it written beside its place (:func:`rsosm_cli.workspace.atomic`).

    CRS: the most frequent one, rasters in others are warped on the fly. Lattice: that of the raster with the smallest
    pixels. Where rasters overlap, the later one is on top wherever it has image. ``nodata``: see
    :mod:`rsosm_cli.imagery.missing`.
    """
    crs = Counter(r.crs for r in rasters).most_common(1)[0][0]
    bands = min(len(r.bands) for r in rasters)
    stretch = stretch_of(rasters, bands, nodata=nodata)
    origin, width, height = _lattice(rasters, crs)
    names = [_name(number, raster) for number, raster in enumerate(rasters)]
    masks = [None] * len(rasters) if nodata is None else _masks(rasters, names, folder, nodata, progress)
    image_sources: list[list[str]] = [[] for _ in range(bands)]
    alpha_sources: list[str] = []
    warped = 0
    for raster, name, mask in zip(rasters, names, masks, strict=True):
        placed, ours = raster, False
        name_in_vrt = source_name(*from_folder(raster.path, target.parent))
        foreign = raster.crs != crs or not raster.upright
        if foreign or mask is not None or raster.missing or raster.palette or raster.opaque:
            ordered = folder / f"{name}.vrt"
            beside = None if mask is None else mask.name
            write_text(ordered, ordered_vrt(raster, range(bands), stretch, beside, folder=folder))
            if foreign:
                warped += 1
                ordered = _warped(ordered, crs, origin)
            inner = inspect(str(ordered))
            if bands not in _ALPHA_IS_MASK:
                masked = ordered.with_suffix(".masked.vrt")
                write_text(masked, masked_vrt(inner, ordered.name))
                ordered, inner = masked, inspect(str(masked))
            placed, ours = inner, True
            name_in_vrt = source_name(ordered.relative_to(target.parent).as_posix(), True)
        rect = _rect(placed, origin)
        for band in range(bands):
            source = f"{name_in_vrt}<SourceBand>{placed.bands[band]}</SourceBand>{rect.xml}"
            # What lies in the folder is 8-bit already.
            extra = "<UseMaskBand>true</UseMaskBand>" if ours else scaling(placed, stretch, band)
            source += extra
            kind = "ComplexSource" if extra else "SimpleSource"
            image_sources[band].append(f"<{kind}{rect.resampling}>{source}</{kind}>")
        # Zeros of a raster's mask must not hide what lies under it, hence NODATA.
        alpha_sources.append(
            f"<ComplexSource>{name_in_vrt}<SourceBand>mask,{placed.bands[0]}</SourceBand>"
            f"{rect.xml}<NODATA>0</NODATA></ComplexSource>"
        )
    parts = [vrt_head(crs, origin, width, height)]
    for number, sources in enumerate(image_sources, 1):
        parts.append(f'<VRTRasterBand dataType="Byte" band="{number}">{"".join(sources)}</VRTRasterBand>')
    parts += [alpha_band(bands + 1, "".join(alpha_sources)), "</VRTDataset>"]
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return Mosaic(crs, bands, stretch, warped)


def _name(number: int, raster: Raster) -> str:
    # Shortened: what is made here is called a little longer, and 255 bytes is all that a name may have.
    return f"{number:04d}-{Path(raster.path).stem.encode()[:_NAME_BYTES].decode(errors='ignore')}"


def _masks(
    rasters: Sequence[Raster], names: Sequence[str], folder: Path, nodata: int, progress: Progress
) -> list[Path]:
    """Write where each raster's image is missing by its colour; one piece of work for all, as there may be hundreds."""
    masks = [folder / f"{name}.mask.tif" for name in names]
    with progress.task("looking for missing image", sum(r.height for r in rasters), "rows") as advance:
        for raster, mask in zip(rasters, masks, strict=True):
            write_mask(raster, mask, nodata, advance)
    return masks


@dataclass(frozen=True)
class _Rect:
    xml: str
    resampling: str


def _rect(raster: Raster, origin: Affine) -> _Rect:
    """Return where a raster goes on the lattice, and ``resampling`` where it is not on the lattice's pixels."""
    left, top = (raster.transform.c - origin.c) / origin.a, (raster.transform.f - origin.f) / origin.e
    across, down = raster.width * raster.transform.a / origin.a, raster.height * raster.transform.e / origin.e
    box = [left, top, left + across, top + down]
    whole = [round(v) for v in box]
    aligned = all(abs(a - b) < _ALIGNED_PX for a, b in zip(box, whole, strict=True))
    aligned = aligned and (whole[2] - whole[0], whole[3] - whole[1]) == (raster.width, raster.height)
    if aligned:
        left, top, across, down = whole[0], whole[1], raster.width, raster.height
    xml = (
        f'<SrcRect xOff="0" yOff="0" xSize="{raster.width}" ySize="{raster.height}"/>'
        f'<DstRect xOff="{left!r}" yOff="{top!r}" xSize="{across!r}" ySize="{down!r}"/>'
    )
    return _Rect(xml, "" if aligned else ' resampling="bilinear"')


def _lattice(rasters: Sequence[Raster], crs: str) -> tuple[Affine, int, int]:
    """Return the transform, width and height of the mosaic."""
    own = [r for r in rasters if r.crs == crs]  # the upright ones first: the others are resampled in any case
    finest = _upright(min(own, key=lambda r: (round(_pixel_area(r), 12), not r.upright)))
    boxes = [r.bounds if r.crs == crs else transform_bounds(r.crs, crs, *r.bounds, densify_pts=21) for r in rasters]
    west, south = min(b[0] for b in boxes), min(b[1] for b in boxes)
    east, north = max(b[2] for b in boxes), max(b[3] for b in boxes)
    # Rounded before floor and ceil: a raster on the lattice must not gain a pixel from the last digit of a float.
    col_min = math.floor(round((west - finest.c) / finest.a, 3))
    row_min = math.floor(round((north - finest.f) / finest.e, 3))
    col_max = math.ceil(round((east - finest.c) / finest.a, 3))
    row_max = math.ceil(round((south - finest.f) / finest.e, 3))
    origin = Affine(
        finest.a, 0.0, finest.c + col_min * finest.a, 0.0, finest.e, finest.f + row_min * finest.e
    )  # fmt: skip
    return origin, col_max - col_min, row_max - row_min


def _pixel_area(raster: Raster) -> float:
    """Return the area of a pixel, in square units of its CRS."""
    t = raster.transform
    return abs(t.a * t.e - t.b * t.d)


def _upright(raster: Raster) -> Affine:
    """Return the lattice of a raster; of a turned one, that of pixels as large from the corner of the box around it."""
    t = raster.transform
    if raster.upright:
        return t
    if t.b == t.d == 0:
        across, down = abs(t.a), abs(t.e)
    elif t.a == t.e == 0:
        across, down = abs(t.b), abs(t.d)
    else:
        across = down = math.sqrt(_pixel_area(raster))
    west, _, _, north = raster.bounds
    return Affine(across, 0.0, west, 0.0, -down, north)


def _warped(ordered: Path, crs: str, origin: Affine) -> Path:
    """Write a warped VRT of ``ordered`` on the lattice of ``origin``; returns its path."""
    target = ordered.with_suffix(".warped.vrt")
    with rasterio.open(ordered) as source:
        box = transform_bounds(source.crs, crs, *inspect(str(ordered)).bounds, densify_pts=21)
        col_min, row_min = math.floor((box[0] - origin.c) / origin.a), math.floor((box[3] - origin.f) / origin.e)
        col_max, row_max = math.ceil((box[2] - origin.c) / origin.a), math.ceil((box[1] - origin.f) / origin.e)
        transform = Affine(
            origin.a, 0.0, origin.c + col_min * origin.a, 0.0, origin.e, origin.f + row_min * origin.e
        )  # fmt: skip
        with (
            WarpedVRT(
                source, crs=crs, transform=transform, width=col_max - col_min, height=row_max - row_min,
                resampling=Resampling.bilinear,
            ) as vrt,
            atomic(target) as part,
        ):  # fmt: skip
            rasterio.shutil.copy(vrt, part, driver="VRT")
    return target
