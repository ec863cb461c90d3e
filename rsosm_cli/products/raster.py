"""Rasters of maps: parts that outlive an interruption, and the cloud-optimised GeoTIFF made of them.

GDAL's COG driver copies a finished raster and cannot be written window by window. The finished strips are tiled
GeoTIFFs of their own; a virtual raster over them is what the driver copies, so that nothing is written twice and an
interruption never leaves a half-written file to be opened again.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.windows import Window

from rsosm_cli.errors import DiskError
from rsosm_cli.geometry import PixelBounds, Projection
from rsosm_cli.workspace import atomic, require_space

# GDAL's block cache is 5 % of the machine's memory unless set; this is enough for a strip of blocks.
CACHE_MB = 64
SQUARE_PX = 2048  # of a raster at a time
_GDAL_TYPES = {"uint8": "Byte", "float32": "Float32"}


@dataclass(frozen=True)
class RasterForm:
    """What a raster looks like, whatever its place. One entry of ``bands`` a band: its description."""

    dtype: str
    nodata: float
    bands: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] = ()  # palette of class 0, 1, ...
    categories: tuple[str, ...] = ()  # names of class 0, 1, ...
    scale: float | None = None  # value = stored * scale
    unit: str = ""
    resampling: str = "AVERAGE"  # of the overviews
    tags: Mapping[str, str] = field(default_factory=dict)


def bounded() -> rasterio.Env:
    """Return the GDAL environment of everything here: a bounded block cache, no files beside the rasters."""
    return rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO")


def pixel_squares(raster: Any) -> Iterator[Window]:
    """Yield windows of at most ``SQUARE_PX`` on a side that cover a raster."""
    for row in range(0, raster.height, SQUARE_PX):
        for col in range(0, raster.width, SQUARE_PX):
            yield Window(col, row, min(SQUARE_PX, raster.width - col), min(SQUARE_PX, raster.height - row))


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Turn what GDAL says of a failed write into a sentence; it has no error number for a full disk."""
    try:
        yield
    except RasterioError as error:
        raise DiskError(
            f"{path.name} could not be written: {' '.join(str(error).split())}.",
            hint="Is the disk full? Free some space and run the command again; what is finished is kept.",
            path=str(path),
        ) from error


def write_part(path: Path, values: NDArray[Any], projection: Projection, bounds_px: PixelBounds, nodata: float) -> None:
    """Write (H, W) or (bands, H, W) ``values`` over ``bounds_px`` of ``projection`` as a tiled GeoTIFF, atomically."""
    bands = values[None] if values.ndim == 2 else values
    count, height, width = bands.shape
    with (
        atomic(path) as part,
        _full_disk(path),
        bounded(),
        rasterio.open(
            part, "w", driver="GTiff", width=width, height=height, count=count, dtype=bands.dtype, nodata=nodata,
            crs=projection.crs, transform=projection.transform_of(bounds_px), tiled=True, blockxsize=512,
            blockysize=512, compress="DEFLATE", zlevel=1, predictor=3 if bands.dtype.kind == "f" else 2,
            interleave="band",
        ) as raster,
    ):  # fmt: skip
        raster.write(bands)


def write_mosaic(
    path: Path, parts: Sequence[tuple[Path, PixelBounds]], projection: Projection, area_px: PixelBounds,
    form: RasterForm,
) -> None:  # fmt: skip
    """Write a virtual raster over ``parts`` (files, named from where ``path`` is, with bounds); the rest is nodata."""
    root = ET.Element("VRTDataset", rasterXSize=str(area_px.width), rasterYSize=str(area_px.height))
    ET.SubElement(root, "SRS").text = projection.crs
    ET.SubElement(root, "GeoTransform").text = ", ".join(
        repr(float(v)) for v in projection.transform_of(area_px).to_gdal()
    )
    metadata = ET.SubElement(root, "Metadata")
    for key, value in form.tags.items():
        ET.SubElement(metadata, "MDI", key=key).text = value
    for number, description in enumerate(form.bands, start=1):
        band = ET.SubElement(root, "VRTRasterBand", dataType=_GDAL_TYPES[form.dtype], band=str(number))
        ET.SubElement(band, "Description").text = description
        ET.SubElement(band, "NoDataValue").text = repr(form.nodata)
        if form.unit:
            ET.SubElement(band, "UnitType").text = form.unit
        if form.scale is not None:
            ET.SubElement(band, "Offset").text = "0"
            ET.SubElement(band, "Scale").text = repr(form.scale)
        if form.colours:
            ET.SubElement(band, "ColorInterp").text = "Palette"
            table = ET.SubElement(band, "ColorTable")
            for place in range(256):
                red, green, blue = form.colours[place] if place < len(form.colours) else (0, 0, 0)
                alpha = 255 if place < len(form.colours) else 0
                ET.SubElement(table, "Entry", c1=str(red), c2=str(green), c3=str(blue), c4=str(alpha))
        for file, box in parts:
            source = ET.SubElement(band, "SimpleSource")
            ET.SubElement(source, "SourceFilename", relativeToVRT="1").text = Path(
                os.path.relpath(file, path.parent)
            ).as_posix()
            ET.SubElement(source, "SourceBand").text = str(number)
            size: dict[str, Any] = {"xSize": str(box.width), "ySize": str(box.height)}
            ET.SubElement(
                source, "SourceProperties", RasterXSize=str(box.width), RasterYSize=str(box.height),
                DataType=_GDAL_TYPES[form.dtype], BlockXSize="512", BlockYSize="512",
            )  # fmt: skip
            ET.SubElement(source, "SrcRect", xOff="0", yOff="0", **size)
            ET.SubElement(
                source, "DstRect", xOff=str(box.col_min - area_px.col_min), yOff=str(box.row_min - area_px.row_min),
                **size,
            )  # fmt: skip
    with atomic(path) as part:
        ET.ElementTree(root).write(part, encoding="utf-8", xml_declaration=False)


def write_cog(mosaic: Path, target: Path, form: RasterForm, *, parts: Sequence[Path]) -> None:
    """Copy a virtual raster into a cloud-optimised GeoTIFF with overviews, in bounded memory; rename it at the end.

    Raises :class:`DiskError` before it starts where the disk has no room for the copy and its overviews.
    """
    # The COG driver keeps the overviews in a file of their own until the end: a third more, twice for a moment.
    stored = sum(os.path.getsize(part) for part in parts)
    require_space(target.parent, 2.7 * stored + 16e6, f"Writing {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    predictor = "FLOATING_POINT" if form.dtype == "float32" else "NO" if form.colours else "STANDARD"
    with atomic(target) as part, _full_disk(target), bounded():
        rasterio.shutil.copy(
            mosaic, part, driver="COG", COMPRESS="DEFLATE", LEVEL=6, PREDICTOR=predictor, BLOCKSIZE=512,
            BIGTIFF="IF_SAFER", OVERVIEWS="IGNORE_EXISTING", OVERVIEW_RESAMPLING=form.resampling, NUM_THREADS="1",
        )  # fmt: skip


def write_categories(raster: Path, form: RasterForm) -> Path:
    """Write the class names where GDAL looks for them: TIFF has no place for them, ``.aux.xml`` beside it has."""
    root = ET.Element("PAMDataset")
    names = ET.SubElement(ET.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames")
    for name in form.categories:
        ET.SubElement(names, "Category").text = name
    path = raster.with_name(f"{raster.name}.aux.xml")
    with atomic(path) as part:
        ET.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
    return path
