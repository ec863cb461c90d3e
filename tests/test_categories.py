"""Category embeddings: what is met together, and what is of one kind, ends close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from rsosm_cli.settings import CategorySettings
from rsosm_cli.text.categories import CategoryRows, category_names, key_of
from rsosm_cli.text.cooccurrence import cooccurrences, delaunay_network, embed_categories, random_walks

NAMES = (
    "", "amenity", "amenity:bar", "amenity:pub", "amenity:school", "office", "office:law", "shop", "shop:beer",
    "shop:toys",
)  # fmt: skip
ROW = {name: i for i, name in enumerate(NAMES)}
PARENT = np.array([ROW[key_of(name)] for name in NAMES])


@pytest.fixture(scope="module")
def points() -> tuple[np.ndarray, np.ndarray]:
    """Bars and beer in the west, schools and toys in the east; the middle is empty."""
    draw = np.random.default_rng(0)
    xy = draw.random((1500, 2)) * 1000 + [4e5, 3e6]
    west = xy[:, 0] < 4e5 + 500
    xy[~west, 0] += 3000
    of = lambda *names: draw.choice([ROW[name] for name in names], len(xy))  # noqa: E731
    return xy, np.where(west, of("amenity:bar", "shop:beer"), of("amenity:school", "shop:toys"))


def embedded(points: tuple[np.ndarray, np.ndarray], **changes: float) -> torch.Tensor:
    xy, category = points
    settings = CategorySettings.model_validate({"walks": 3, "updates": 200, **changes})
    network = delaunay_network(np.array([0, len(xy)]), xy)
    walks = random_walks(network, settings, seed=0)
    counts = cooccurrences(walks, category, len(NAMES), settings.window)
    return embed_categories(counts, PARENT, 16, settings, seed=0)


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(vectors, dim=1)
    return unit @ unit.T


def test_what_is_met_together_ends_close(points):
    near = cosines(embedded(points, siblings=0.0))
    bar, beer, school, toys = (ROW[n] for n in ("amenity:bar", "shop:beer", "amenity:school", "shop:toys"))
    assert near[bar, beer] > 0.5
    assert near[school, toys] > 0.5
    assert near[bar, school] < 0
    assert near[beer, toys] < 0


def test_siblings_are_pulled_together(points):
    bar, school, toys = (ROW[n] for n in ("amenity:bar", "amenity:school", "shop:toys"))
    loose, tight = cosines(embedded(points, siblings=0.0)), cosines(embedded(points, siblings=0.1))
    assert tight[bar, school] > loose[bar, school] + 0.3
    assert tight[bar, school] > tight[bar, toys]


def test_what_is_not_met_has_the_vector_of_its_kind(points):
    vectors = embedded(points)
    torch.testing.assert_close(vectors[ROW["amenity:pub"]], vectors[ROW["amenity"]])
    mean = (vectors[ROW["amenity:bar"]] + vectors[ROW["amenity:school"]]) / 2
    torch.testing.assert_close(vectors[ROW["amenity"]], mean)
    torch.testing.assert_close(vectors[ROW["office:law"]], vectors[ROW[""]])
    known = [ROW[n] for n in ("amenity:bar", "amenity:school", "shop:beer", "shop:toys")]
    assert vectors[known].square().mean().item() == pytest.approx(1, abs=1e-3)


def test_the_seed_decides(points):
    torch.testing.assert_close(embedded(points), embedded(points), atol=0, rtol=0)


def test_walks_go_along_edges_and_turn_back_as_p_says():
    xy = np.random.default_rng(1).random((200, 2))
    network = delaunay_network(np.array([0, 200, 200, 200]), xy)
    source = np.repeat(np.arange(200), np.diff(network.starts))
    edges = set((source * 200 + network.neighbours).tolist())
    back = {}
    for p in (0.05, 20.0):
        walks = random_walks(network, CategorySettings(p=p, q=1.0), seed=2)
        assert walks.shape == (1000, 10)
        assert set((walks[:, :-1] * 200 + walks[:, 1:]).ravel().tolist()) <= edges
        back[p] = (walks[:, 2:] == walks[:, :-2]).mean()
    assert back[0.05] > 0.6
    assert back[20.0] < 0.05


def test_far_and_few_points():
    # Two groups of ground share no edge; a group of one point has none, and its walk stands still.
    xy = np.random.default_rng(3).random((41, 2))
    network = delaunay_network(np.array([0, 20, 40, 41]), xy)
    walks = random_walks(network, CategorySettings(), seed=0)
    assert ((walks[:, 0] < 20) == (walks[:, 1] < 20))[walks[:, 1] >= 0].all()
    assert (walks[walks[:, 0] == 40][:, 1:] == -1).all()
    nothing = delaunay_network(np.array([0]), np.zeros((0, 2)))
    assert random_walks(nothing, CategorySettings(), seed=0).shape == (0, 10)
    empty = embed_categories(np.zeros((1, 1), np.int64), np.array([0]), 4, CategorySettings(), seed=0)
    assert empty.tolist() == [[0.0] * 4]


def test_rows_of_the_table():
    names = category_names(["amenity:bar", "amenity:rare", "shop:none"], np.array([9, 2, 0]), least=5)
    assert names == ("", "amenity", "amenity:bar")
    rows = CategoryRows(names)
    assert rows.rows(["amenity:bar", "amenity:rare", "shop:toys", "x"]).tolist() == [2, 1, 0, 0]
    assert rows.encode(["amenity:bar"]).tolist() == [[2.0]]
