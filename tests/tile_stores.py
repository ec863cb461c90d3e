"""Small tile stores for tests: each tile shows its objects as squares whose colour is that of their tag."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.arrays import EdgeArrays, GraphArrays, NodeArrays
from rsosm_cli.graph.schema import EDGE_TYPES, KEY_POINTS, NODE_TYPES
from rsosm_cli.settings import BuildSettings
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.parts import assemble, image_part, write_part

GSD_M = 0.5
PALETTE = np.random.default_rng(7).integers(40, 256, (64, 3)).astype(np.uint8)


def make_graphs(counts: NDArray[np.int64], n_tags: int, seed: int = 0) -> GraphArrays:
    """Return graphs with ``counts`` (T, 3) nodes a tile and type; every node touches every other of its tile."""
    rng = np.random.default_rng(seed)
    nodes = {}
    for column, name in enumerate(NODE_TYPES):
        offsets = ragged.offsets_of(counts[:, column])
        n = int(offsets[-1])
        centroid = rng.uniform(0.1, 0.9, (n, 2)).astype(np.float32)
        spread = rng.uniform(-0.08, 0.08, (n, KEY_POINTS[name], 2)).astype(np.float32)
        spread[:, -1 if name == "polygon" else 0] = 0
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float32) * 0.05
        tags = rng.integers(1, 3, n)
        nodes[name] = NodeArrays(
            offsets=offsets,
            osm_type=np.ones(n, dtype=np.uint8),
            osm_id=np.arange(n, dtype=np.int64),
            tag_offsets=ragged.offsets_of(tags),
            tag_ids=rng.integers(0, n_tags, int(tags.sum())).astype(np.int32),
            key_points=centroid[:, None] + spread,
            area=np.full(n, 0.01 if name == "polygon" else 0, dtype=np.float32),
            length=np.full(n, 0 if name == "point" else 0.1, dtype=np.float32),
            envelope=centroid[:, None] + (0 if name == "point" else 1) * corners,
            centroid=centroid,
            class_code=np.zeros(n, dtype=np.int16),
        )
    edges = {}
    for a, _, b in EDGE_TYPES:
        n_a, n_b = np.diff(nodes[a].offsets), np.diff(nodes[b].offsets)
        offsets = ragged.offsets_of(n_a * n_b)
        owner = ragged.owners(offsets)
        place = np.arange(int(offsets[-1])) - offsets[owner]
        width = np.maximum(n_b[owner], 1)
        index = np.stack([place // width, place % width]).astype(np.int32)
        edges[a, b] = EdgeArrays(offsets, index, np.zeros(index.shape[1], dtype=np.uint8))
    return GraphArrays(nodes, edges)


def draw(graphs: GraphArrays, tile_px: int) -> NDArray[np.uint8]:
    """Return (T, 3, H, W): grey ground and a coloured square at the centroid of every node."""
    images = np.full((graphs.n_tiles, 3, tile_px, tile_px), 90, dtype=np.uint8)
    for name in NODE_TYPES:
        n = graphs.nodes[name]
        tile = ragged.owners(n.offsets)
        for t, (x, y), tag in zip(tile, n.centroid, n.tag_ids[n.tag_offsets[:-1]], strict=True):
            left, top = max(0, int(x * tile_px) - 3), max(0, int(y * tile_px) - 3)
            images[t, :, top : top + 7, left : left + 7] = PALETTE[tag % len(PALETTE)][:, None, None]
    return images


def make_store(
    path: Path,
    *,
    side: int = 8,
    tile_px: int = 32,
    n_tags: int = 12,
    seed: int = 0,
    without_image: int = 0,
    without_objects: int = 0,
    origin: tuple[int, int] = (0, 0),
    tags: list[str] | None = None,
    images: NDArray[np.uint8] | None = None,
) -> Path:
    """Write a store of ``side`` x ``side`` tiles with up to three objects of each type; the last tiles have none."""
    rng = np.random.default_rng(seed)
    n = side * side
    counts = rng.integers(0, 4, (n, 3))
    counts[:, 2] = np.maximum(counts[:, 2], 1)
    counts[n - without_objects :] = 0
    names = tags or sorted(f"building:kind{i:02d}" for i in range(n_tags))
    graphs = make_graphs(counts, len(names), seed)
    share = np.ones(n, dtype=np.float32)
    share[:without_image] = 0
    column, row = np.meshgrid(np.arange(side) + origin[0], np.arange(side) + origin[1])
    cells = np.stack([column.ravel(), row.ravel()], axis=1).astype(np.int64)
    size = tile_px * GSD_M
    bounds = np.concatenate([cells * size, (cells + 1) * size], axis=1).astype(np.float64)
    part = path.with_suffix(".part0.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with image_part(part, n, (3, tile_px, tile_px)) as writer:
        writer.append(draw(graphs, tile_px) if images is None else images)
    write_part(
        part, graphs, [(t, t.rpartition(":")[0]) for t in names], cells=cells, bounds_m=bounds, image_share=share,
        numbers={},
    )  # fmt: skip
    assemble(
        path, [part],
        settings=BuildSettings.model_validate({"grid": {"tile": tile_px, "stride": tile_px, "gsd": GSD_M}}),
        crs="EPSG:32645", gsd_m=GSD_M, has_images=True,
        provenance={"sources": [{"name": "squares", "licence": "CC0", "attribution": "test"}]},
    )  # fmt: skip
    return path
