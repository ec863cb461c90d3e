"""Elements and graphs of a few shapes over two tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely
import shapely.affinity

from rsosm_cli.graph.builder import Built, build_graphs
from rsosm_cli.graph.schema import RELATIONS
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import GraphSettings

TILES = np.array([[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]])
CONVERSE = {"cover": "cover-by", "cover-by": "cover", "within": "contain", "contain": "within"}


def elements_of(shapes: list[Any], tags: list[dict[str, str]] | None = None) -> Elements:
    geometry = np.array(shapes, dtype=object)
    kind = np.clip(shapely.get_dimensions(geometry), 0, 2).astype(np.uint8)
    ids = np.arange(1, len(shapes) + 1)
    all_tags = tags or [{"building": "yes"} for _ in shapes]
    order = np.lexsort((kind, ids, np.minimum(kind, 1)))
    return Elements(
        "EPSG:32629", np.minimum(kind, 1)[order].astype(np.uint8), ids[order], kind[order],
        [all_tags[i] for i in order], geometry[order],
    )  # fmt: skip


def built(elements: Elements, graph: GraphSettings | None = None, tiles: np.ndarray = TILES) -> Built:
    graph = graph or GraphSettings()
    return build_graphs(elements, tiles, graph, Vocabulary.of(elements, graph.tags))


def named_edges(result: Built, a: str, b: str) -> dict[tuple[int, int, int], str]:
    """Return {(tile, source, target): relation}."""
    edges = result.graphs.edges[a, b]
    tile = np.repeat(np.arange(result.graphs.n_tiles), np.diff(edges.offsets))
    names = [RELATIONS[a, b][c] for c in edges.relation]
    return dict(zip(zip(tile.tolist(), *edges.index.tolist(), strict=True), names, strict=True))
