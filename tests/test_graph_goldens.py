"""The published graphs: node order, edges, relations, positions and semantics under ``compat: released``."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch

from rsosm_cli.graph.builder import Built, build_graphs, to_tile
from rsosm_cli.graph.keypoints import released_polygon_points
from rsosm_cli.graph.schema import EDGE_WIDTHS, NODE_TYPES
from rsosm_cli.graph.vocabulary import Vocabulary
from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import GraphSettings, TagSettings
from rsosm_cli.tiles.batch import to_hetero

RELEASED = GraphSettings(compat="released", tags=TagSettings(names=True, exclude=()))

CASES = [
    "ex_a1085095888_S2_20", "ex_a472140250_FI_21", "ex_w221548378_US_21", "syn_concave", "syn_points_3", "syn_points_4",
    "syn_present_PLT", "syn_present_P_T", "syn_present__LT", "syn_present___T", "syn_tag_weights",
]  # fmt: skip


class Case:
    def __init__(self, folder: Path, name: str) -> None:
        record = json.loads((folder / f"{name}.json").read_text())
        with np.load(folder / f"{name}.npz") as arrays:
            self.golden = dict(arrays)
        box = record["bbox"]
        self.bounds = np.array([[box["west"], box["south"], box["east"], box["north"]]])
        self.weights = record["weights"]
        kinds, ids, tags, shapes = [], [], [], []
        for kind, node_type in enumerate(NODE_TYPES):
            for i, (label, wkb) in enumerate(
                zip(record["tags"][node_type] or [], record["wkb_hex"].get(node_type, []), strict=True)
            ):
                kinds.append(kind)
                ids.append(i)
                tags.append(dict(tag.split(":", 1) if ":" in tag else (tag, "") for tag in label.split(";")))
                shapes.append(shapely.from_wkb(bytes.fromhex(wkb)))
        kind = np.array(kinds, np.uint8)
        self.elements = Elements("EPSG:4326", kind, np.array(ids, np.int64), kind, tags, np.array(shapes, object))
        self.vocabulary = Vocabulary.of(self.elements, RELEASED.tags)

    def build(self) -> Built:
        return build_graphs(self.elements, self.bounds, RELEASED, self.vocabulary)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> Case:
    return Case(shared / "goldens" / "graph", request.param)


def test_edges_and_relations_are_the_published(case: Case) -> None:
    graphs = case.build().graphs
    for (a, b), edges in graphs.edges.items():
        np.testing.assert_array_equal(edges.index, case.golden[f"edge_index__{a}__{b}"], err_msg=f"{a}-{b}")
        one_hot = np.eye(EDGE_WIDTHS[a, b], dtype=np.float32)[edges.relation]
        golden = case.golden[f"edge_attr__{a}__{b}"]
        # Ours has `cross` after the published columns of two lines.
        np.testing.assert_array_equal(one_hot[:, : golden.shape[1]], golden, err_msg=f"{a}-{b}")
        assert not one_hot[:, golden.shape[1] :].any()


def test_positions_are_the_published_but_for_the_drawn_ones(case: Case) -> None:
    graphs = case.build().graphs
    for node_type in NODE_TYPES:
        ours, golden = graphs.nodes[node_type].key_points, case.golden[f"pos__{node_type}"].reshape(-1, 1, 2)
        golden = golden.reshape(ours.shape)
        fixed = slice(3, 4) if node_type == "polygon" else slice(None)
        np.testing.assert_allclose(ours[:, fixed], golden[:, fixed], atol=2e-6)


def test_key_points_of_the_recorded_radii_are_the_published(case: Case) -> None:
    if "polygon_radius_draws_min_max_value" not in case.golden:
        pytest.skip("no polygons")
    polygons = case.elements.geometry[case.elements.kind == 2]
    centroid = shapely.get_coordinates(shapely.centroid(polygons))
    radii = case.golden["polygon_radius_draws_min_max_value"][..., 2]
    points = to_tile(released_polygon_points(polygons, centroid, radii=radii), case.bounds.repeat(len(polygons), 0))
    np.testing.assert_allclose(points.reshape(-1, 8), case.golden["pos__polygon"], atol=2e-6)


def test_semantics_are_the_published_weighted_means(case: Case) -> None:
    tags = case.vocabulary.tags
    vectors = np.stack([np.random.default_rng(zlib.crc32(t.encode())).standard_normal(512, np.float32) for t in tags])
    counts = [case.weights.get(case.vocabulary.key_of(i), 1) for i in range(len(tags))]
    batch = to_hetero(case.build().graphs, torch.from_numpy(vectors), torch.tensor(counts).log())
    for node_type in NODE_TYPES:
        np.testing.assert_allclose(batch[node_type].x.numpy(), case.golden[f"sem__{node_type}"], atol=1e-5)
