"""``embeddings.h5`` and what is made of it: GeoParquet, and a picture of the first three principal components."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rsosm_cli import __version__
from rsosm_cli.errors import FormatError, MissingError, UsageError
from rsosm_cli.geometry import WGS84, reproject
from rsosm_cli.products.preview import draw_preview
from rsosm_cli.products.view import LegendEntry, MapView
from rsosm_cli.workspace import atomic, require_space

if TYPE_CHECKING:
    from shapely import Geometry

FORMAT, VERSION = "rsosm embeddings", 1
VECTORS = ("fused", "image", "osm")  # the first that is there is drawn
CHUNK = 4096  # tiles at a time, of pooled vectors
ENOUGH = 16  # whole tiles from which axes and colours can be had


def write_embeddings(
    path: Path, blocks: Sequence[Path], *, crs: str, bounds_m: NDArray[np.float64], cells: NDArray[np.int64],
    names: Sequence[str], facts: Mapping[str, Any],
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Join finished blocks into ``embeddings.h5``, a block in memory at a time; return the shape of each data set.

    ``facts`` become attributes; what is no number or text is written as JSON.
    """
    with np.load(blocks[0]) as first:
        layout = {key: (first[key].shape[1:], first[key].dtype) for key in first.files}
    total = len(bounds_m)
    size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in layout.values()) * total
    require_space(path.parent, size * 1.02 + 1e6, f"Writing {path.name}")
    with atomic(path) as part, h5py.File(part, "w", libver="latest") as file:
        attributes = {"format": FORMAT, "version": VERSION, "rsosm": __version__, "crs": crs, **facts}
        for key, value in attributes.items():
            plain = isinstance(value, (str, int, float, bool))
            file.attrs[key] = value if plain else json.dumps(value, ensure_ascii=False, sort_keys=True)
        file.create_dataset("bounds_m", data=bounds_m)
        file.create_dataset("cells", data=cells)
        if len(names):
            file.create_dataset("name", data=list(names), dtype=h5py.string_dtype())
        for key, (shape, dtype) in layout.items():
            file.create_dataset(key, (total, *shape), dtype)
        row = 0
        for block in blocks:
            with np.load(block) as arrays:
                count = len(arrays["n_objects"])
                for key in layout:
                    file[key][row : row + count] = arrays[key]
            row += count
    return {key: (total, *shape) for key, (shape, _) in layout.items()}


def recorded_key(path: Path) -> str | None:
    """Return the fingerprint that a finished ``embeddings.h5`` carries; None where there is none to be read."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("key", "")) if file.attrs.get("format") == FORMAT else None
    except OSError:
        return None


@dataclass(frozen=True)
class Pooled:
    """The pooled vectors of an ``embeddings.h5``, read a chunk at a time."""

    path: Path
    crs: str
    vectors: tuple[str, ...]
    facts: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Pooled:
        """Open a file. Raises :class:`MissingError` or :class:`FormatError`."""
        if not path.exists():
            raise MissingError(f"There is no {path}.", hint="Make it with rsosm embed.")
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT or file.attrs.get("version") != VERSION:
                    raise FormatError(f"{path} holds no embeddings of rsosm.", hint="Make it with rsosm embed.")
                return cls(path, str(file.attrs["crs"]), tuple(v for v in VECTORS if v in file), dict(file.attrs))
        except (OSError, KeyError) as error:
            raise FormatError(
                f"{path} is damaged: {' '.join(str(error).split())}.", hint="Make it again with rsosm embed --force."
            ) from error

    def column(self, name: str) -> NDArray[Any]:
        with h5py.File(self.path, "r") as file:
            return np.asarray(file[name][:])

    def chunks(self, names: Sequence[str]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        with h5py.File(self.path, "r") as file:
            for row in range(0, len(file["bounds_m"]), CHUNK):
                yield row, {name: file[name][row : row + CHUNK] for name in names}


def write_parquet(path: Path, pooled: Pooled) -> None:
    """Write the pooled vectors as GeoParquet 1.1, a row a tile: its square in WGS 84, a list of floats an encoding."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import shapely

    columns = ["bounds_m", "cells", "image_share", "n_objects", *pooled.vectors]
    writer: pq.ParquetWriter | None = None
    boxes = reproject(shapely.box(*pooled.column("bounds_m").T), pooled.crs, WGS84)
    column = {"encoding": "WKB", "geometry_types": ["Polygon"], "bbox": shapely.total_bounds(boxes).tolist()}
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    metadata = {b"geo": json.dumps(geo, sort_keys=True).encode(), b"rsosm": __version__.encode()}
    with atomic(path) as part:
        try:
            for row, found in pooled.chunks(columns):
                count = len(found["cells"])
                arrays: dict[str, Any] = {
                    "tile": pa.array(np.arange(row, row + count)),
                    "column": pa.array(found["cells"][:, 0]),
                    "row": pa.array(found["cells"][:, 1]),
                    "image_share": pa.array(found["image_share"]),
                    "n_objects": pa.array(found["n_objects"]),
                }
                for name in pooled.vectors:
                    vectors = found[name].astype(np.float32)
                    arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
                arrays["geometry"] = pa.array(shapely.to_wkb(boxes[row : row + count]), pa.binary())
                table = pa.table(arrays).replace_schema_metadata(metadata)
                if writer is None:
                    writer = pq.ParquetWriter(part, table.schema, compression="zstd")
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


@dataclass(frozen=True)
class Components:
    """First three principal components of ``T`` tiles: ``scores`` (T, 3), NaN without an encoding, their share of the
    variance (3,), and which tiles they were computed from, ``whole`` (T,).
    """

    of: str
    scores: NDArray[np.float64]
    shares: NDArray[np.float64]
    whole: NDArray[np.bool_]


def principal_components(pooled: Pooled) -> Components:
    """Return the components of the first of fused, image and OSM encodings that is there, in two passes of chunks.

    Tiles that the image covers in part are the least like all others and the least of interest: where enough tiles are
    whole, these alone make the axes.
    """
    name = pooled.vectors[0]
    whole = np.ones(len(pooled.column("bounds_m")), bool)
    if name != "osm":
        full = pooled.column("image_share") > 0.999
        whole = full if full.sum() >= ENOUGH else whole
    count, total, square = 0, np.zeros(1), np.zeros((1, 1))
    for row, found in pooled.chunks([name]):
        x = found[name].astype(np.float64)
        x = x[np.isfinite(x).all(axis=1) & whole[row : row + len(x)]]
        count, total, square = count + len(x), total + x.sum(axis=0), square + x.T @ x
    mean = total / max(count, 1)
    values, axes = np.linalg.eigh(square / max(count, 1) - np.outer(mean, mean))
    axes = axes[:, ::-1][:, :3]
    # The sign of an axis is arbitrary; its largest entry is made positive, so that a picture is always the same.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    scores = [(found[name].astype(np.float64) - mean) @ axes for _, found in pooled.chunks([name])]
    variance = np.maximum(values[::-1], 0)
    return Components(name, np.concatenate(scores), variance[:3] / max(variance.sum(), 1e-300), whole)


def draw_components(path: Path, pooled: Pooled, *, city: str, place: Geometry | None, attribution: str) -> None:
    """Draw the first three components as red, green and blue of a map; ``place`` is in the CRS of the tiles.

    Raises :class:`UsageError` for tiles that lie on no common grid.
    """
    cells, bounds = pooled.column("cells"), pooled.column("bounds_m")
    first, last = cells.min(axis=0), cells.max(axis=0)
    width, height = (last - first + 1).tolist()
    if len(np.unique(cells, axis=0)) < len(cells) or width * height > 100 * len(cells) + 10_000:
        raise UsageError(f"The tiles of {pooled.path.name} lie on no common grid: there is no map to draw.")
    found = principal_components(pooled)
    known = np.isfinite(found.scores).all(axis=1)
    colours = np.zeros((height, width, 4), np.uint8)
    if known.any():
        ruling = known & found.whole if (known & found.whole).any() else known
        low, high = np.percentile(found.scores[ruling], [2, 98], axis=0)
        tone = np.clip((found.scores[known] - low) / np.maximum(high - low, 1e-12), 0, 1)
        col, row = (cells[known] - first).T
        # From 30 to 245: no tile drowns in black or vanishes in white.
        colours[row, col] = np.concatenate([30 + 215 * tone, np.full((len(tone), 1), 255)], axis=1).round()
    view = MapView(
        title=f"Encodings ({_NAMES[found.of]})", city=city,
        values=np.where(colours[..., 3] > 0, 0, 255).astype(np.uint8),
        image=None, bounds_m=_square(cells, bounds, first, last), crs=pooled.crs, colours=colours, place=place,
        legend=tuple(
            LegendEntry(f"Component {i + 1}", colour, float(share))
            for i, (colour, share) in enumerate(zip(("#d9473f", "#3f9f4d", "#3d6fc4"), found.shares, strict=False))
        ),
        attribution=attribution, note="Similar colours are similar places. Percentages: share of the variance.",
    )  # fmt: skip
    draw_preview(path, view)


_NAMES = {"fused": "image and OSM", "image": "image", "osm": "OSM"}


def _square(
    cells: NDArray[np.int64], bounds: NDArray[np.float64], first: NDArray[np.int64], last: NDArray[np.int64]
) -> tuple[float, float, float, float]:
    """Return the bounds of the picture: a pixel a cell, in the middle of its tile."""
    centre = np.stack([bounds[:, 0] + bounds[:, 2], bounds[:, 1] + bounds[:, 3]], axis=1) / 2
    spans = last - first
    steps = []
    for axis in range(2):
        a, b = np.argmin(cells[:, axis]), np.argmax(cells[:, axis])
        size = bounds[0, 2 + axis] - bounds[0, axis]
        steps.append(abs(centre[b, axis] - centre[a, axis]) / spans[axis] if spans[axis] else size)
    # One step for both directions where a map is a single row or column of tiles.
    step = min(steps)
    west = centre[np.argmin(cells[:, 0]), 0] - step / 2
    north = centre[np.argmin(cells[:, 1]), 1] + step / 2
    return float(west), float(north - (spans[1] + 1) * step), float(west + (spans[0] + 1) * step), float(north)
