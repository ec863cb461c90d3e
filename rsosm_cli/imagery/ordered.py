"""A small VRT that puts a user's raster in order: 8-bit bands with an alpha band last. Nothing is copied.

Whatever says in the raster itself which pixels are missing (nodata value, mask, alpha, NaN, a palette's clear colours)
becomes the alpha band.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import rasterio
from affine import Affine

from rsosm_cli.imagery.raster import Raster
from rsosm_cli.imagery.stretch import Stretch, is_stretched

# 255 wherever a source has a pixel at all: what it skips keeps the 0 that a band begins with.
_ALL_255 = "<ScaleOffset>255</ScaleOffset><ScaleRatio>0</ScaleRatio>"


def ordered_vrt(
    raster: Raster,
    bands: Sequence[int],
    stretch: Stretch | None,
    mask: str | None = None,
    *,
    folder: Path | None = None,
) -> str:
    """Return VRT XML of a raster on its own lattice: ``bands`` (places in ``raster.bands``, from 0) and alpha.

    ``mask`` is a one-band raster beside the VRT, by name, on the same lattice, 0 where the image is missing; default:
    what the raster says. ``folder``: where the VRT will lie, if anywhere.
    """
    size = f'xSize="{raster.width}" ySize="{raster.height}"'
    rect = f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/>'
    parts = [vrt_head(raster.crs, raster.transform, raster.width, raster.height)]
    name = source_name(*from_folder(raster.path, folder)) + _options(raster)
    for number, place in enumerate(bands, 1):
        if raster.palette:
            colour = f"<ColorTableComponent>{raster.bands[place]}</ColorTableComponent>"
            body = f"<ComplexSource>{name}<SourceBand>1</SourceBand>{rect}{colour}</ComplexSource>"
        else:
            source = f"{name}<SourceBand>{raster.bands[place]}</SourceBand>{rect}"
            scale = scaling(raster, stretch, place)
            body = (
                f"<ComplexSource>{source}{scale}</ComplexSource>" if scale else f"<SimpleSource>{source}</SimpleSource>"
            )
        parts.append(f'<VRTRasterBand dataType="Byte" band="{number}">{body}</VRTRasterBand>')
    if mask is not None:
        alpha = f"<SimpleSource>{source_name(mask, True)}<SourceBand>1</SourceBand>{rect}</SimpleSource>"
        parts.append(alpha_band(len(bands) + 1, alpha))
    else:
        parts.append(_alpha_of(raster, name, rect, len(bands) + 1))
    return "".join([*parts, "</VRTDataset>"])


def scaling(raster: Raster, stretch: Stretch | None, place: int) -> str:
    """Return what a source of a VRT needs to bring a band of a raster to 8 bits; nothing where it has 8."""
    if stretch is None or not is_stretched(raster):
        return ""
    low, high = stretch[place]
    ratio = 255.0 / (high - low)
    return f"<ScaleOffset>{-low * ratio!r}</ScaleOffset><ScaleRatio>{ratio!r}</ScaleRatio>"


def _alpha_of(raster: Raster, name: str, rect: str, number: int) -> str:
    """Return the alpha band of a raster: the least of all that says how much image a pixel has."""
    sources = []
    if "nodata" in raster.missing:
        # Missing is a pixel that has the nodata value in every band: black in one of them is a colour.
        sources.append(
            "".join(
                f"<ComplexSource>{name}<SourceBand>mask,{b}</SourceBand>{rect}<NODATA>0</NODATA></ComplexSource>"
                for b in raster.stored
            )
        )
    elif raster.opaque and "mask" not in raster.missing:  # GDAL would make a mask of the alpha that is image
        band = f"<SourceBand>{raster.stored[0]}</SourceBand>"
        sources.append(f"<ComplexSource>{name}{band}{rect}{_ALL_255}</ComplexSource>")
    elif "mask" in raster.missing or not raster.missing:  # where nothing is missing, this mask is 255 all over
        band = f"<SourceBand>mask,{raster.stored[0]}</SourceBand>"
        sources.append(f"<SimpleSource>{name}{band}{rect}</SimpleSource>")
    if raster.alpha is not None:
        band, scale = f"<SourceBand>{raster.alpha[0]}</SourceBand>", f"<ScaleRatio>{raster.alpha[1]!r}</ScaleRatio>"
        sources.append(f"<ComplexSource>{name}{band}{rect}<ScaleOffset>0</ScaleOffset>{scale}</ComplexSource>")
    if "nan" in raster.missing:  # unlike a nodata value NaN is no colour: one band is enough
        sources += [
            f"<ComplexSource>{name}<SourceBand>{b}</SourceBand>{rect}{_ALL_255}<NODATA>nan</NODATA></ComplexSource>"
            for b in raster.stored
        ]
    if "palette" in raster.missing:
        clear = "<ColorTableComponent>4</ColorTableComponent>"
        sources.append(f"<ComplexSource>{name}<SourceBand>1</SourceBand>{rect}{clear}</ComplexSource>")
    if len(sources) == 1:
        return alpha_band(number, sources[0])
    # Sources of a plain band lie on one another; to take the least, each must be one source: a VRT of its own.
    single = "".join(s if s.count("</SourceFilename>") == 1 else _alone(s, name, raster, rect) for s in sources)
    kind = "<PixelFunctionType>min</PixelFunctionType><SourceTransferType>Byte</SourceTransferType>"
    return alpha_band(number, kind + single, "VRTDerivedRasterBand")


def masked_vrt(raster: Raster, relative: str) -> str:
    """Return VRT XML of an ordered raster (``relative`` to the VRT) whose alpha band is its mask, too.

    GDAL takes an alpha band for the mask of one or three bands of image alone, and a mosaic needs it of any number.
    """
    size = f'xSize="{raster.width}" ySize="{raster.height}"'
    rect = f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/>'
    sources = [
        f"<SimpleSource>{source_name(relative, True)}<SourceBand>{b}</SourceBand>{rect}</SimpleSource>"
        for b in range(1, len(raster.bands) + 2)
    ]
    parts = [vrt_head(raster.crs, raster.transform, raster.width, raster.height)]
    parts += [f'<VRTRasterBand dataType="Byte" band="{b}">{s}</VRTRasterBand>' for b, s in enumerate(sources[:-1], 1)]
    parts.append(f'<MaskBand><VRTRasterBand dataType="Byte">{sources[-1]}</VRTRasterBand></MaskBand></VRTDataset>')
    return "".join(parts)


def _options(raster: Raster) -> str:
    if raster.overview is None:
        return ""
    return f'<OpenOptions><OOI key="OVERVIEW_LEVEL">{raster.overview}</OOI></OpenOptions>'


def _alone(sources: str, name: str, raster: Raster, rect: str) -> str:
    sources = sources.replace(name, source_name(raster.path) + _options(raster))  # within a VRT nothing is beside it
    band = f'<VRTRasterBand dataType="Byte" band="1">{sources}</VRTRasterBand>'
    inner = f"{vrt_head(raster.crs, raster.transform, raster.width, raster.height)}{band}</VRTDataset>"
    return f"<SimpleSource>{source_name(inner)}<SourceBand>1</SourceBand>{rect}</SimpleSource>"


def vrt_head(crs: str, transform: Affine, width: int, height: int) -> str:
    gdal = ", ".join(repr(float(v)) for v in transform.to_gdal())
    # Axis mapping 2: x first, whatever order the authority of the CRS prescribes.
    srs = f"<SRS>{escape(rasterio.crs.CRS.from_user_input(crs).to_wkt())}</SRS>"
    return f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{srs}<GeoTransform>{gdal}</GeoTransform>'


def from_folder(path: str, folder: Path | None) -> tuple[str, bool]:
    """Return how a VRT in ``folder`` names a path, and whether that is relative: what lies there moves with it."""
    if folder is None or not Path(path).is_relative_to(folder.resolve()):
        return path, False
    return Path(path).relative_to(folder.resolve()).as_posix(), True


def source_name(path: str, relative: bool = False) -> str:
    return f'<SourceFilename relativeToVRT="{int(relative)}" shared="0">{escape(path)}</SourceFilename>'


def alpha_band(number: int, sources: str, kind: str = "") -> str:
    sub_class = f' subClass="{kind}"' if kind else ""
    return (
        f'<VRTRasterBand dataType="Byte" band="{number}"{sub_class}><ColorInterp>Alpha</ColorInterp>{sources}'
        "</VRTRasterBand>"
    )
