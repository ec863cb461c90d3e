"""Folders of chips: images that each have their own vector files and bounds, or a ready graph, become tiles.

A chip is a stem. ``a.jpg`` (``.png``, ``.tif``; also ``a_img.png``) is its image; ``a.json`` its bounds, ``{"bounds":
[west, south, east, north], "crs": "EPSG:4326"}``, not needed beside a georeferenced image; ``a_point.geojson``,
``a_line.geojson``, ``a_polygon.geojson`` or one ``a.geojson`` (or GeoPackage, GeoParquet, shapefile) its objects, tags
in columns or in one ``label`` column (``key:value;key:value``). ``a.npz`` or ``a.pt`` is a ready graph in their place.
``*_label.*`` files are left to ``finetune``. Chips may lie in folders of their own.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, MissingError, NoFileError, UsageError
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles.parts import image_part, write_part
from rsosm_cli.tiles.ready import READY_SUFFIXES, join_ready, read_ready

_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_VECTORS = (".geojson", ".gpkg", ".parquet", ".shp")
_ENDINGS = ("_point", "_line", "_polygon")
# Chips a part: bounds memory, and what an interruption costs.
CHIPS_A_BLOCK = 256


@dataclass(frozen=True)
class Chip:
    """The files of one chip."""

    name: str
    image: Path | None
    bounds: Path | None
    vectors: tuple[Path, ...]
    ready: Path | None

    @property
    def files(self) -> list[Path]:
        return [p for p in (self.image, self.bounds, self.ready, *self.vectors) if p is not None]


@dataclass(frozen=True)
class ChipBlock:
    """What a worker needs to build one part."""

    part: Path
    first: int
    chips: tuple[Chip, ...]
    crs: str
    has_images: bool
    settings: BuildSettings

    def __len__(self) -> int:
        return len(self.chips)


def find_chips(folder: Path) -> list[Chip]:
    """Return the chips of a folder and its subfolders, by name. Raises :class:`MissingError`, :class:`UsageError`."""
    if not folder.is_dir():
        raise NoFileError(f"There is no folder of chips {folder}.", path=str(folder))
    images: dict[str, Path] = {}
    bounds: dict[str, Path] = {}
    ready: dict[str, Path] = {}
    vectors: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        suffix, stem = path.suffix.lower(), path.with_suffix("").relative_to(folder).as_posix()
        if stem.endswith("_label"):
            continue
        if suffix in _IMAGES:
            images[stem.removesuffix("_img")] = path
        elif suffix == ".json":
            bounds[stem] = path
        elif suffix in READY_SUFFIXES:
            ready[stem] = path
        elif suffix in _VECTORS:
            ending = next((e for e in _ENDINGS if stem.endswith(e)), "")
            vectors.setdefault(stem.removesuffix(ending), []).append(path)
    stems = sorted({*images, *ready, *vectors})
    if not stems:
        raise MissingError(
            f"There are no chips in {folder}.", hint="A chip is an image with vector files, or a ready graph."
        )
    with_ready = sum(s in ready for s in stems)
    if 0 < with_ready < len(stems):
        lone = next(s for s in stems if s not in ready)
        raise UsageError(
            f"{folder} mixes {with_ready} ready graphs with chips that have none, such as {lone}.",
            hint="A store carries either ready node vectors or tags: give two folders.",
        )
    names = _short_names(stems)
    return [
        Chip(n, images.get(s), bounds.get(s), tuple(vectors.get(s, ())), ready.get(s))
        for s, n in zip(stems, names, strict=True)
    ]


def _short_names(stems: list[str]) -> list[str]:
    """Return the last parts of the stems where these differ, else the stems."""
    short = [s.rsplit("/", 1)[-1] for s in stems]
    return short if len(set(short)) == len(short) else stems


def common_crs(chips: list[Chip]) -> str:
    """Return the CRS of all chips' bounds; empty for ready graphs. Raises :class:`UsageError` where they differ."""
    if chips[0].ready is not None:
        return ""
    first = _place(chips[0])[1]
    for chip in chips[1:]:
        crs = _place(chip)[1]
        if crs != first:
            raise UsageError(
                f"Chip {chips[0].name} is in {first}, and {chip.name} in {crs}: one store needs one CRS.",
                hint="Give the chips of each CRS a folder of their own, and train on both stores.",
            )
    return first


def build_chips(block: ChipBlock) -> int:
    """Build the part of some chips and return how many they are."""
    chips, side = block.chips, block.settings.grid.tile
    share = np.zeros(len(chips), np.float32)
    if block.has_images:
        with image_part(block.part, len(chips), (len(block.settings.bands), side, side)) as part:
            for i, chip in enumerate(chips):
                image, share[i] = read_chip_image(chip, block.settings.bands, side)
                part.append(image[None])
    numbers: dict[str, NDArray[np.int64]] = {}
    if chips[0].ready is not None:
        graphs = join_ready([read_ready(chip.ready) for chip in chips if chip.ready is not None])
        tags: list[tuple[str, str]] = []
        bounds = np.tile([0.0, 0.0, 1.0, 1.0], (len(chips), 1))
    else:
        from rsosm_cli.graph.builder import build_graphs
        from rsosm_cli.graph.vocabulary import Vocabulary

        bounds = np.array([_place(chip)[0] for chip in chips])
        elements, tile = _elements(chips, block.crs)
        vocabulary = Vocabulary.of(elements, block.settings.graph.tags)
        built = build_graphs(elements, bounds, block.settings.graph, vocabulary, tile=tile)
        graphs, tags = built.graphs, list(zip(vocabulary.tags, vocabulary.keys, strict=True))
        numbers = {name: found for name, found in built.numbers.items() if name != "elements"}
    number = np.arange(block.first, block.first + len(chips))
    write_part(
        block.part,
        graphs,
        tags,
        cells=np.stack([number, np.zeros_like(number)], axis=1),
        bounds_m=bounds,
        image_share=share,
        numbers=numbers,
        names=[chip.name for chip in chips],
    )
    return len(chips)


def _place(chip: Chip) -> tuple[tuple[float, float, float, float], str]:
    """Return bounds and CRS of a chip, from its JSON or its image."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    if chip.bounds is not None:
        try:
            record: dict[str, Any] = json.loads(chip.bounds.read_text(encoding="utf-8"))
            west, south, east, north = (float(v) for v in record["bounds"])
            crs = str(record.get("crs") or "EPSG:4326")
            CRS.from_user_input(crs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CRSError) as error:
            raise FormatError(
                f"{chip.bounds} does not give the bounds of a chip: {error}.",
                hint='It should read {"bounds": [west, south, east, north], "crs": "EPSG:4326"}.',
            ) from error
    else:
        if chip.image is None:
            raise MissingError(f"Chip {chip.name} has neither bounds nor an image.", hint=f"Add {chip.name}.json.")
        from rsosm_cli.imagery.raster import open_raster

        with open_raster(str(chip.image)) as dataset:
            if dataset.crs is None:
                raise MissingError(
                    f"Chip {chip.name} has no bounds: its image is not georeferenced.", hint=f"Add {chip.name}.json."
                )
            (west, south, east, north), crs = dataset.bounds, dataset.crs.to_string()
    if not (west < east and south < north):
        raise FormatError(f"The bounds of chip {chip.name} are empty: {west} {south} {east} {north}.")
    return (west, south, east, north), crs


def read_chip_image(chip: Chip, bands: tuple[int, ...], side: int) -> tuple[NDArray[np.uint8], float]:
    """Return (C, side, side) of a chip of any size and shape, and the share of it that is image.

    Resampled to the square of a tile (averaged where smaller, bilinear where larger): positions are shares of width and
    height, so objects stay on their pixels.
    """
    from rasterio.enums import Resampling

    from rsosm_cli.imagery.raster import open_raster

    if chip.image is None:
        return np.zeros((len(bands), side, side), np.uint8), 0.0
    with open_raster(str(chip.image)) as dataset:
        if dataset.count < max(bands):
            raise UsageError(
                f"{chip.image} has {dataset.count} bands, and band {max(bands)} is asked for.",
                hint="Choose with --set bands=[1] or the like.",
            )
        if dataset.dtypes[bands[0] - 1] != "uint8":
            raise UsageError(f"{chip.image} is not an 8-bit image.", hint="Convert it to 8 bit.")
        coarser = dataset.width >= side and dataset.height >= side
        method = Resampling.average if coarser else Resampling.bilinear
        image = dataset.read(list(bands), out_shape=(len(bands), side, side), resampling=method)
        valid = dataset.dataset_mask(out_shape=(side, side)) > 0
    image[:, ~valid] = 0
    return image, float(valid.mean())


def _elements(chips: tuple[Chip, ...], crs: str) -> tuple[Any, NDArray[np.int64]]:
    """Return the objects of all chips as elements, numbered in the order of their files, and the chip of each."""
    import shapely

    from rsosm_cli.osm.elements import Elements
    from rsosm_cli.osm.vectors import read_vectors, row_tags

    shapes, tags, tile, order = [], [], [], []
    for i, chip in enumerate(chips):
        first = zlib.crc32(chip.name.encode()) << 24  # so that objects of different chips draw differently
        count = 0
        for path in chip.vectors:
            frame = read_vectors(path).to_crs(crs)
            frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
            shapes.append(shapely.force_2d(frame.geometry.to_numpy()))
            tags += row_tags(frame)
            tile.append(np.full(len(frame), i))
            order.append(first + count + np.arange(len(frame)))
            count += len(frame)
    geometry = np.concatenate([np.empty(0, object), *shapes])
    dimension = shapely.get_dimensions(geometry)  # of a collection: of its highest part
    kind = np.clip(dimension, 0, 2).astype(np.uint8)
    osm_type = np.minimum(kind, 1).astype(np.uint8)  # points as nodes, the rest as ways
    osm_id = np.concatenate([np.empty(0, np.int64), *order])
    return Elements(crs, osm_type, osm_id, kind, tags, geometry), np.concatenate([np.empty(0, np.int64), *tile])
