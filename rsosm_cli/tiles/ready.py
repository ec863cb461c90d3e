"""Ready heterographs with node vectors, as the authors of GeoLink publish them: ``.npz`` and PyTorch Geometric ``.pt``.

Nodes are ``x`` (N, W + 2 k): W semantic columns, then k key points. Nothing is unpickled but tensors and plain
containers: the classes of a ``.pt`` are replaced by one that keeps their attributes and does nothing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError
from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.schema import EDGE_WIDTHS, KEY_POINTS, NODE_TYPES
from rsosm_cli.tiles.ragged import join

READY_SUFFIXES = (".npz", ".pt")

# The classes of PyTorch Geometric whose attributes make a graph.
_INERT = tuple(
    f"torch_geometric.data.{name}"
    for name in (
        "hetero_data.HeteroData", "data.Data", "storage.BaseStorage", "storage.GlobalStorage", "storage.NodeStorage",
        "storage.EdgeStorage", "graph_store.EdgeAttr", "graph_store.EdgeLayout", "feature_store.TensorAttr",
    )
)  # fmt: skip


class _Inert:
    """Stands for a class of a ``.pt``: keeps what was set, runs nothing."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_ready(path: Path) -> GraphArrays:
    """Return the graph of one tile. Raises :class:`FormatError`."""
    return to_arrays(_read_npz(path) if path.suffix == ".npz" else _read_pt(path), path)


def join_ready(graphs: Sequence[GraphArrays]) -> GraphArrays:
    """Return graphs as one; those without nodes take the width of the others. Raises :class:`FormatError`."""
    widths = {n.vectors.shape[1] for g in graphs for n in g.nodes.values() if n.vectors is not None}
    if len(widths) > 1:
        raise FormatError(f"Ready graphs of one store must have node vectors of one width, not {sorted(widths)}.")
    return join(graphs)


def to_arrays(found: dict[str, NDArray[Any]], path: Path) -> GraphArrays:
    """Return flat arrays of ``x__<type>``, ``edge_index__<a>__<b>`` and ``edge_attr__<a>__<b>``; absent ones are empty.

    Sizes and envelopes are not in such files: areas and lengths are 0, envelopes the centroid.
    """
    widths = {x.shape[1] - 2 * KEY_POINTS[t] for t in NODE_TYPES if (x := found.get(f"x__{t}")) is not None}
    if len(widths) != 1 or (width := widths.pop()) <= 0:
        raise FormatError(
            f"{path} is not a ready graph: nodes must have semantic columns and then "
            f"{', '.join(f'{2 * k} ({t})' for t, k in KEY_POINTS.items())} of position."
        )
    nodes = {}
    for t in NODE_TYPES:
        x = np.asarray(found.get(f"x__{t}", np.empty((0, width + 2 * KEY_POINTS[t]))), np.float32)
        n = len(x)
        points = x[:, width:].reshape(n, KEY_POINTS[t], 2)
        # A point's only key point; of a polygon the last one is its centroid; a released line starts with it.
        centroid = points[:, 0 if t == "line" else -1]
        zero = np.zeros(n, np.float32)
        nodes[t] = NodeArrays(
            offsets=np.array([0, n]),
            osm_type=np.zeros(n, np.uint8),
            osm_id=np.arange(n),
            tag_offsets=np.zeros(n + 1, np.int64),
            tag_ids=np.empty(0, np.int32),
            key_points=points,
            area=zero,
            length=zero,
            envelope=np.repeat(centroid[:, None], 4, axis=1),
            centroid=centroid,
            class_code=np.full(n, -1, np.int16),
            vectors=np.ascontiguousarray(x[:, :width]),
        )
    edges = {}
    for (a, b), columns in EDGE_WIDTHS.items():
        index = np.asarray(found.get(f"edge_index__{a}__{b}", np.empty((2, 0))), np.int64)
        attr = np.asarray(found.get(f"edge_attr__{a}__{b}", np.empty((index.shape[-1], columns))))
        sizes = np.array([[len(nodes[a].osm_id)], [len(nodes[b].osm_id)]])
        if (
            index.ndim != 2 or len(index) != 2 or (index < 0).any() or (index >= sizes).any()
            or attr.ndim != 2 or len(attr) != index.shape[1] or attr.shape[1] > columns
        ):  # fmt: skip
            raise FormatError(f"{path} is not a ready graph: its edges {a} to {b} do not fit its nodes.")
        relation = attr.argmax(axis=1) if len(attr) else np.empty(0)
        edges[a, b] = EdgeArrays(np.array([0, index.shape[1]]), index.astype(np.int32), relation.astype(np.uint8))
    return GraphArrays(nodes, edges)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not a readable .npz: {error}.") from error


@contextmanager
def _only_inert() -> Iterator[None]:
    """Let nothing but tensors and our stand-ins be made: PyTorch Geometric, once imported, allows its own classes."""
    from torch import serialization

    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals([(_Inert, name) for name in _INERT])
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _read_pt(path: Path) -> dict[str, NDArray[Any]]:
    import torch

    try:
        with _only_inert():
            graph = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError) as error:
        raise FormatError(
            f"{path} is not a graph that can be read without running code of it: {str(error).splitlines()[0]}",
            hint="Save it as .npz, as docs/formats.md says.",
        ) from error
    found: dict[str, NDArray[Any]] = {}
    state = graph.__dict__ if isinstance(graph, _Inert) else {}
    for name, store in state.get("_node_store_dict", {}).items():
        mapping = store.__dict__.get("_mapping", {})
        if isinstance(mapping.get("x"), torch.Tensor):
            found[f"x__{name}"] = mapping["x"].numpy()
    for (a, _, b), store in state.get("_edge_store_dict", {}).items():
        for key in ("edge_index", "edge_attr"):
            value = store.__dict__.get("_mapping", {}).get(key)
            if isinstance(value, torch.Tensor):
                found[f"{key}__{a}__{b}"] = value.numpy()
    return found
