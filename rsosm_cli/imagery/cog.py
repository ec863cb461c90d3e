"""Tiles of a service -> one cloud-optimised GeoTIFF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio._err import CPLE_BaseError  # what rasterio.shutil raises; there is no public name for it
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError

from rsosm_cli.errors import DiskError, SourceError
from rsosm_cli.imagery.missing import HALO_PX, missing_pixels
from rsosm_cli.imagery.present import no_image
from rsosm_cli.imagery.tile_client import Tile, TileClient, decode
from rsosm_cli.imagery.tile_set import TileSet
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.workspace import atomic, require_space


def write_cog(
    client: TileClient,
    tiles: TileSet,
    missing: Sequence[Tile],
    target: Path,
    nodata: int | None,
    attribution: str,
    progress: Progress = SILENT,
) -> float:
    """Write tiles as a COG: red, green, blue, alpha (0 where there is no image), DEFLATE, overviews.

    Returns the share of the present tiles' pixels that are image; raises :class:`SourceError` where none is.
    GDAL's COG driver only copies, hence a plain tiled file first. Lossless, so that the pixels are those of the tiles.
    """
    px, grid = tiles.tile_px, client.service.grid
    matrix = grid.matrix(tiles.zoom)
    side = matrix.side
    absent = set(missing)
    present = [tile for tile in tiles.ids() if tile not in absent]
    columns, rows = [x for _, x, _ in present], [y for _, _, y in present]
    x0, y0 = min(columns), min(rows)
    width, height = (max(columns) - x0 + 1) * px, (max(rows) - y0 + 1) * px
    # The plain file, and the copy with its overviews: at worst as large, and a third more.
    require_space(target.parent, 4.0 * width * height * 2.4, f"The image of {width} x {height} pixels")
    profile = {
        "driver": "GTiff", "width": width, "height": height, "count": 4, "dtype": "uint8", "crs": grid.crs,
        "transform": Affine(
            side / px, 0.0, x0 * side + matrix.left, 0.0, -side / px, matrix.top - y0 * side
        ),
        "tiled": True, "blockxsize": min(px, 512) // 16 * 16 or 16, "blockysize": min(px, 512) // 16 * 16 or 16,
        "BIGTIFF": "YES", "SPARSE_OK": "TRUE", "photometric": "RGB",
    }  # fmt: skip
    plain = target.with_name(f".{target.name}.{os.getpid()}.plain.tif")
    target.parent.mkdir(parents=True, exist_ok=True)
    lossy, seen = False, 0
    try:
        with rasterio.Env(GDAL_CACHEMAX=128 * 2**20):
            with (
                rasterio.open(plain, "w", **profile) as image,
                progress.task("assembling tiles", len(present), "tiles") as advance,
            ):
                image.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
                image.update_tags(TIFFTAG_COPYRIGHT=attribution)
                for tile in present:
                    data = client.path(*tile).read_bytes()
                    lossy |= data[:4] != b"\x89PNG"
                    pixels = decode(data)
                    if pixels.shape != (4, px, px):
                        raise SourceError(
                            f"{client.service.name} sends tiles of different sizes: {px} px, and "
                            f"{pixels.shape[2]} px for {'/'.join(map(str, tile))}."
                        )
                    pixels[:3, pixels[3] == 0] = 0
                    seen += int(np.count_nonzero(pixels[3]))
                    top, left = (tile[2] - y0) * px, (tile[1] - x0) * px
                    image.write(pixels, window=((top, top + px), (left, left + px)))
                    advance(1)
            if nodata is not None:
                seen = _mark_missing(plain, nodata, lossy)
            if not seen:
                raise no_image(client.service.name)
            with atomic(target) as part:
                rasterio.shutil.copy(
                    plain, part, driver="COG", COMPRESS="DEFLATE", PREDICTOR="YES", BIGTIFF="IF_SAFER",
                    OVERVIEW_RESAMPLING="AVERAGE", NUM_THREADS="2",
                )  # fmt: skip
    except (RasterioError, CPLE_BaseError) as error:
        detail = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise DiskError(
            f"{target.name} was not written: {detail}.",
            hint="Is the disk full? Free some space and run the command again: the tiles fetched are kept.",
            path=str(target),
        ) from error
    finally:
        plain.unlink(missing_ok=True)
    return seen / (len(present) * px * px)


def _mark_missing(plain: Path, value: int, lossy: bool) -> int:
    """Set alpha to 0 where the image is missing by its colour, strip by strip; return how many pixels are image."""
    seen = 0
    with rasterio.open(plain, "r+") as image:
        for top in range(0, image.height, 512):
            bottom = min(top + 512, image.height)
            first, last = max(0, top - HALO_PX), min(image.height, bottom + HALO_PX)
            pixels = image.read((1, 2, 3), window=((first, last), (0, image.width)))
            gone = missing_pixels(pixels, value, lossy)[top - first : bottom - first]
            window = ((top, bottom), (0, image.width))
            alpha = image.read(4, window=window)
            alpha[gone] = 0
            seen += int(np.count_nonzero(alpha))
            image.write(alpha, 4, window=window)
    return seen
