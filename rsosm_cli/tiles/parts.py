"""Writing ``tiles.h5``: blocks of tiles as part files, then one pass that joins them.

A part appears under its name only when it is whole; what a crash left of another is written again. The HDF5 file is
written once, from finished parts, under a temporary name: one that was open in a crash is never opened again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from rsosm_cli import __version__
from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles.checksums import seal
from rsosm_cli.tiles.store import FORMAT, PAIRS, VERSION, edge_bytes, pack_edges, pack_shapes, shape_width
from rsosm_cli.workspace import atomic, require_space

# Tiles copied at a time from the images of a part.
_IMAGES_AT_A_TIME = 64


class ImagePart:
    """The images of a block, appended in the order of its tiles to ``<part>.images.npy``."""

    def __init__(self, file: BinaryIO, n_tiles: int, shape: tuple[int, ...]) -> None:
        self._file = file
        header = {"descr": "|u1", "fortran_order": False, "shape": (n_tiles, *shape)}
        np.lib.format.write_array_header_1_0(file, header)

    def append(self, images: NDArray[np.uint8]) -> None:
        """Append (n, C, H, W) images."""
        self._file.write(np.ascontiguousarray(images).data)


def images_path(part: Path) -> Path:
    return part.with_suffix(".images.npy")


def finished(part: Path, has_images: bool) -> bool:
    """Return whether a block's files are there; its images are written before its graphs."""
    return part.is_file() and (not has_images or images_path(part).is_file())


@contextmanager
def image_part(part: Path, n_tiles: int, shape: tuple[int, ...]) -> Iterator[ImagePart]:
    """Yield where to append the images (C, H, W) of a block's tiles; they appear whole."""
    with atomic(images_path(part)) as path, path.open("wb") as file:
        yield ImagePart(file, n_tiles, shape)


def write_part(
    part: Path,
    graphs: GraphArrays,
    tags: Sequence[tuple[str, str]],
    *,
    cells: NDArray[np.int64],
    bounds_m: NDArray[np.float64],
    image_share: NDArray[np.float32],
    numbers: Mapping[str, NDArray[np.int64]],
    names: Sequence[str] = (),
) -> None:
    """Write a block of ``T`` tiles (``.npz``), after its images.

    ``tags``: (tag, key) of the vocabulary that the graphs' tag ids point into. ``numbers``: elements by what happened
    to them (see :class:`rsosm_cli.graph.builder.Built`).
    """
    nodes = [graphs.nodes[name] for name in NODE_TYPES]
    edges = [graphs.edges[pair] for pair in PAIRS]
    tag_ids = np.concatenate([n.tag_ids for n in nodes])
    # Only the tags in use travel on: a block's elements reach beyond its tiles.
    times = np.bincount(tag_ids, minlength=len(tags))
    used, tag_ids = np.flatnonzero(times), (np.cumsum(times > 0) - 1)[tag_ids]
    arrays: dict[str, NDArray[Any]] = {
        "cells": cells,
        "bounds_m": bounds_m,
        "image_share": image_share,
        "node_counts": np.stack([np.diff(n.offsets) for n in nodes]),
        "tag_counts": np.stack([np.diff(n.tag_offsets[n.offsets]) for n in nodes]),
        "edge_counts": np.stack([np.diff(e.offsets) for e in edges]),
        "element": np.concatenate([n.osm_id * 4 + n.osm_type for n in nodes]),
        "class_code": np.concatenate([n.class_code for n in nodes]).astype(np.int8),
        "n_tags": np.concatenate([np.diff(n.tag_offsets) for n in nodes]),
        "tag_ids": tag_ids.astype(np.int32),
        "index": np.concatenate([e.index.T for e in edges]),
        "relation": np.concatenate([e.relation for e in edges]),
        "tags": _json_array([tags[i] for i in used.tolist()]),
        "names": _json_array(list(names)),
        **{f"shape_{name}": pack_shapes(name, n) for name, n in zip(NODE_TYPES, nodes, strict=True)},
        **{f"numbers_{name}": found for name, found in numbers.items()},
    }
    arrays["maxima"] = np.array([arrays[n].max(initial=0) for n in ("index", "n_tags")], np.int64)
    ready = [n.vectors for n in nodes if n.vectors is not None]
    if ready:
        arrays["vectors"] = np.concatenate(ready)
    with atomic(part) as path, path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _json_array(values: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(values, ensure_ascii=False).encode(), np.uint8)


def _from_json_array(array: NDArray[np.uint8]) -> Any:
    return json.loads(array.tobytes().decode())


def assemble(
    path: Path,
    parts: Sequence[Path],
    *,
    settings: BuildSettings,
    crs: str,
    gsd_m: float | None,
    provenance: Mapping[str, Any],
    has_images: bool,
) -> dict[str, int]:
    """Join finished parts into a store at ``path``; return counts over all of them.

    Memory holds one part at a time. The bytes depend on the parts and their order alone.
    """
    plan = _Plan(parts, has_images, len(settings.bands), settings.grid.tile)
    require_space(path.parent, plan.n_bytes * 1.02 + 1e6, f"The tile store {path.name}")
    with (
        atomic(path) as temporary,
        # Aligned, so that memory maps of numbers are aligned, too.
        h5py.File(temporary, "w", libver="latest", alignment_threshold=64, alignment_interval=64) as file,
    ):
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["rsosm"] = __version__
        file.attrs["crs"] = crs
        file.attrs["gsd_m"] = gsd_m or 0.0
        file.attrs["tile_px"] = settings.grid.tile
        file.attrs["stride_px"] = settings.grid.stride
        file.attrs["bands"] = np.array(settings.bands, np.int64)
        file.attrs["vector_width"] = plan.vector_width
        file.attrs["edge_bits"] = plan.edge_bits
        file.attrs["settings"] = json.dumps(settings.model_dump(mode="json"), ensure_ascii=False, sort_keys=True)
        file.attrs["provenance"] = json.dumps(dict(provenance), ensure_ascii=False, sort_keys=True)
        datasets = {name: _create(file, name, shape, dtype) for name, (shape, dtype) in plan.layout().items()}
        _write_tags(file, plan)
        plan.fill(datasets)
        seal(file, {"images": plan.images_crc} if has_images else {})
    return plan.counts


class _Plan:
    """Sizes of the joined arrays, read from the parts without their bulk, then the copying."""

    def __init__(self, parts: Sequence[Path], has_images: bool, n_bands: int, tile_px: int) -> None:
        self.parts = parts
        self.image_shape = (n_bands, tile_px, tile_px) if has_images else None
        self.n_tiles = 0
        self.nodes = np.zeros(3, np.int64)
        self.tags = np.zeros(3, np.int64)
        self.edges = np.zeros(9, np.int64)
        self.maxima = np.zeros(2, np.int64)
        self.vector_width = 0
        self.images_crc = 0
        keys: dict[str, str] = {}
        numbers: dict[str, list[NDArray[np.int64]]] = {}
        empty = no_image = part_image = 0
        self.names: list[str] = []
        for part in parts:
            with np.load(part, allow_pickle=False) as arrays:
                node_counts = arrays["node_counts"]
                self.n_tiles += node_counts.shape[1]
                empty += int((node_counts.sum(axis=0) == 0).sum())
                share = arrays["image_share"]
                no_image += int((share == 0).sum())
                part_image += int(((share > 0) & (share < 1)).sum())
                self.nodes += node_counts.sum(axis=1)
                self.tags += arrays["tag_counts"].sum(axis=1)
                self.edges += arrays["edge_counts"].sum(axis=1)
                self.maxima = np.maximum(self.maxima, arrays["maxima"])
                if "vectors" in arrays:
                    self.vector_width = arrays["vectors"].shape[1]
                self.names += _from_json_array(arrays["names"])
                for tag, key in _from_json_array(arrays["tags"]):
                    keys[tag] = max(key, keys.get(tag, ""), key=len)
                for name in arrays.files:
                    if name.startswith("numbers_"):
                        numbers.setdefault(name.removeprefix("numbers_"), []).append(arrays[name])
        self.vocabulary = sorted(keys)
        self.key_lengths = np.array([len(keys[tag]) for tag in self.vocabulary], np.uint16)
        self.tag_counts = np.zeros(len(keys), np.int64)
        self.counts = {
            "tiles": self.n_tiles,
            "tiles_without_osm": empty,
            "tiles_without_image": no_image,
            "tiles_with_part_of_the_image": part_image,
            **{f"{name}s": int(n) for name, n in zip(NODE_TYPES, self.nodes, strict=True)},
            "edges": int(self.edges.sum()),
            "tags": len(self.vocabulary),
            **{name: len(np.unique(np.concatenate(found))) for name, found in numbers.items()},
        }

    def layout(self) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Return shape and type of every array of the store, in the order in which they are laid out."""
        n, t = int(self.nodes.sum()), self.n_tiles
        most_tags = int(self.maxima[1])
        layout: dict[str, tuple[tuple[int, ...], DTypeLike]] = {
            "tiles/cells": ((t, 2), np.int64),
            "tiles/bounds_m": ((t, 4), np.float64),
            "tiles/image_share": ((t,), np.float32),
            "tags/key_length": ((len(self.vocabulary),), np.uint16),
            "tags/count": ((len(self.vocabulary),), np.int64),
            "nodes/offsets": ((3, t + 1), _smallest(n)),
            "nodes/tag_offsets": ((3, t + 1), _smallest(int(self.tags.sum()))),
            "nodes/element": ((n,), np.int64),
            "nodes/class_code": ((n,), np.int8),
            "nodes/n_tags": ((n,), _smallest(most_tags)),
            "nodes/tag_ids": ((int(self.tags.sum()),), _smallest(max(len(self.vocabulary) - 1, 0))),
            **{
                f"nodes/{name}": ((int(count), shape_width(name)), np.float32)
                for name, count in zip(NODE_TYPES, self.nodes, strict=True)
            },
            "edges/offsets": ((9, t + 1), _smallest(int(self.edges.sum()))),
            "edges/packed": ((int(self.edges.sum()), edge_bytes(self.edge_bits)), np.uint8),
        }
        if self.vector_width:
            layout["nodes/vectors"] = ((n, self.vector_width), np.float32)
        if self.image_shape is not None:
            layout["images"] = ((t, *self.image_shape), np.uint8)
        return layout

    @property
    def edge_bits(self) -> int:
        """Bits that hold every node's number within its tile and type."""
        return max(int(self.maxima[0]).bit_length(), 1)

    @property
    def n_bytes(self) -> int:
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.layout().values())

    def fill(self, datasets: Mapping[str, h5py.Dataset]) -> None:
        """Copy the parts into the datasets, part after part, each type and pair to its own stretch."""
        number = {tag: i for i, tag in enumerate(self.vocabulary)}
        stretch = {
            "nodes": np.cumsum(self.nodes) - self.nodes,
            "tags": np.cumsum(self.tags) - self.tags,
            "edges": np.cumsum(self.edges) - self.edges,
        }
        shape_at = np.zeros(3, np.int64)
        # Offsets end where the next stretch begins; they are written as running counts, one behind.
        tile = 0
        for kind, name in (("nodes", "nodes/offsets"), ("tags", "nodes/tag_offsets"), ("edges", "edges/offsets")):
            datasets[name][:, 0] = stretch[kind]
        for part in self.parts:
            with np.load(part, allow_pickle=False) as arrays:
                node_counts, tag_counts, edge_counts = (
                    arrays[name] for name in ("node_counts", "tag_counts", "edge_counts")
                )
                last = tile + node_counts.shape[1]
                for name in ("cells", "bounds_m", "image_share"):
                    datasets[f"tiles/{name}"][tile:last] = arrays[name]
                for kind, counts, name in (
                    ("nodes", node_counts, "nodes/offsets"),
                    ("tags", tag_counts, "nodes/tag_offsets"),
                    ("edges", edge_counts, "edges/offsets"),
                ):
                    datasets[name][:, tile + 1 : last + 1] = stretch[kind][:, None] + np.cumsum(counts, axis=1)
                table = np.array([number[tag] for tag, _ in _from_json_array(arrays["tags"])], np.int64)
                tag_ids = table[arrays["tag_ids"]] if len(table) else arrays["tag_ids"]
                self.tag_counts += np.bincount(tag_ids, minlength=len(self.tag_counts))
                made = {
                    "tag_ids": tag_ids,
                    "packed": pack_edges(arrays["index"], arrays["relation"], self.edge_bits),
                }
                for kind, counts, columns in (
                    ("nodes", node_counts, ("element", "class_code", "n_tags", "vectors")),
                    ("tags", tag_counts, ("tag_ids",)),
                    ("edges", edge_counts, ("packed",)),
                ):
                    sizes = counts.sum(axis=1)
                    ends = np.cumsum(sizes)
                    for column in columns:
                        if column not in made and column not in arrays:
                            continue
                        values = made[column] if column in made else arrays[column]
                        target = datasets[f"{'edges' if kind == 'edges' else 'nodes'}/{column}"]
                        for row, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True)):
                            if size:
                                at = int(stretch[kind][row])
                                target[at : at + size] = values[end - size : end]
                    stretch[kind] = stretch[kind] + sizes
                for row, name in enumerate(NODE_TYPES):
                    values = arrays[f"shape_{name}"]
                    if len(values):
                        datasets[f"nodes/{name}"][shape_at[row] : shape_at[row] + len(values)] = values
                    shape_at[row] += len(values)
            if self.image_shape is not None:
                self.images_crc = _copy_images(images_path(part), datasets["images"], tile, self.images_crc)
            tile = last
        datasets["tags/key_length"][...] = self.key_lengths
        datasets["tags/count"][...] = self.tag_counts


def _copy_images(source: Path, target: h5py.Dataset, first: int, crc: int) -> int:
    """Copy the images of a part to tile ``first`` and on; return the checksum ``crc`` of those before with them."""
    images = np.load(source, mmap_mode="r", allow_pickle=False)
    for start in range(0, len(images), _IMAGES_AT_A_TIME):
        chunk = np.ascontiguousarray(images[start : start + _IMAGES_AT_A_TIME])
        target[first + start : first + start + len(chunk)] = chunk
        crc = zlib.crc32(chunk.data, crc)
    return crc


def _write_tags(file: h5py.File, plan: _Plan) -> None:
    strings = h5py.string_dtype("utf-8")
    file.create_dataset("tags/text", data=plan.vocabulary, shape=(len(plan.vocabulary),), dtype=strings)
    if plan.names:
        file.create_dataset("tiles/name", data=plan.names, dtype=strings)


def _smallest(largest: int) -> DTypeLike:
    """Return the smallest unsigned type of 1, 2, 4 or 8 bytes that holds ``largest``."""
    return np.min_scalar_type(largest)


def _create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> h5py.Dataset:
    """Create a contiguous dataset whose place in the file is fixed now and which is never filled with zeros first."""
    group, _, leaf = name.rpartition("/")
    parent = file.require_group(group) if group else file
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    return h5py.Dataset(h5py.h5d.create(parent.id, leaf.encode(), kind, space, properties))
