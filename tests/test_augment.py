"""Crops, flips and colours of tiles, with the graphs transformed alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_stores import draw, make_graphs

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.settings import AugmentSettings
from rsosm_cli.tiles import ragged
from rsosm_cli.tiles.augment import Views, draw_views, normalise, view_graphs, view_images, whole_views
from rsosm_cli.tiles.draws import Shuffle, uniform

TILE_PX = 64


def views_of(left: int, top: int, side: int, flip: bool, n: int = 1, turn: int = 0) -> Views:
    one = np.ones(n, dtype=np.int64)
    return Views(
        left * one, top * one, side * one, turn * one, np.full(n, flip), np.ones((n, 3), dtype=np.float32), TILE_PX
    )  # fmt: skip


@given(st.integers(0, 20), st.integers(0, 20), st.booleans(), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_node_moves_with_its_pixels(left: int, top: int, flip: bool, turn: int, seed: int) -> None:
    graphs = make_graphs(np.array([[0, 0, 1]]), 1, seed)
    centroid = graphs.nodes["polygon"].centroid
    image = np.zeros((1, 3, TILE_PX, TILE_PX), dtype=np.uint8)
    column, row = (centroid[0] * TILE_PX).astype(int)
    image[0, :, row, column] = 255
    side = 40
    views = views_of(left, top, side, flip, turn=turn)
    seen = view_graphs(graphs, views).nodes["polygon"]
    pixels = view_images(image, views, side)[0, 0].numpy()
    if not (left <= column < left + side and top <= row < top + side):
        assert pixels.max() == 0
        return
    at_row, at_column = np.unravel_index(pixels.argmax(), pixels.shape)
    # The centroid lies within the pixel that shows it.
    assert np.abs(seen.centroid[0] * side - (at_column + 0.5, at_row + 0.5)).max() <= 0.5 + 1e-4


def test_a_node_stays_if_any_key_point_is_inside_and_its_points_are_clamped() -> None:
    graphs = make_graphs(np.array([[0, 2, 0]]), 1)
    line = graphs.nodes["line"]
    line.key_points[:] = [[[0.2, 0.2], [0.1, 0.2], [0.8, 0.2]], [[0.7, 0.7], [0.6, 0.7], [0.8, 0.7]]]
    line.length[:] = 0.2
    seen = view_graphs(graphs, views_of(0, 0, TILE_PX // 2, False))
    assert seen.nodes["line"].osm_id.tolist() == [0]
    np.testing.assert_allclose(seen.nodes["line"].key_points, [[[0.4, 0.4], [0.2, 0.4], [1.0, 0.4]]], atol=1e-6)
    np.testing.assert_allclose(seen.nodes["line"].length, [0.4])  # a crop of half the side has half the perimeter
    assert seen.edges["line", "line"].index.tolist() == [[0], [0]]  # of four edges, the one to itself is left


def test_sizes_are_rescaled_and_envelopes_flipped_in_the_builders_order() -> None:
    graphs = make_graphs(np.array([[0, 0, 1]]), 1)
    polygon = graphs.nodes["polygon"]
    polygon.key_points[:] = 0.25
    polygon.centroid[:] = 0.25
    polygon.envelope[:] = [[[0.25, 0.1], [0.35, 0.25], [0.25, 0.4], [0.15, 0.25]]]
    seen = view_graphs(graphs, views_of(0, 0, TILE_PX // 2, True)).nodes["polygon"]
    np.testing.assert_allclose(seen.area, [0.04], rtol=1e-6)
    expected = [[[0.5, 0.2], [0.7, 0.5], [0.5, 0.8], [0.3, 0.5]]]  # clockwise from the highest corner, as before
    np.testing.assert_allclose(seen.envelope, expected, atol=1e-6)


def test_turned_envelopes_are_in_the_builders_order() -> None:
    graphs = make_graphs(np.array([[0, 0, 1]]), 1)
    polygon = graphs.nodes["polygon"]
    polygon.envelope[:] = [[[0.2, 0.1], [0.6, 0.1], [0.6, 0.3], [0.2, 0.3]]]
    seen = view_graphs(graphs, views_of(0, 0, TILE_PX, False, turn=1)).nodes["polygon"]
    np.testing.assert_allclose(seen.envelope, [[[0.1, 0.4], [0.3, 0.4], [0.3, 0.8], [0.1, 0.8]]], atol=1e-6)


def test_many_tiles_at_once_equal_each_alone() -> None:
    rng = np.random.default_rng(0)
    graphs = make_graphs(rng.integers(0, 5, (12, 3)), 9)
    samples = np.arange(12)
    views = draw_views(AugmentSettings(), TILE_PX, 3, 1, samples)
    seen = view_graphs(graphs, views)
    images = draw(graphs, TILE_PX)
    pixels = view_images(images, views, 48)
    for i in range(12):
        alone = draw_views(AugmentSettings(), TILE_PX, 3, 1, samples[i : i + 1])
        one = view_graphs(ragged.take_tiles(graphs, np.array([i])), alone)
        part = ragged.take_tiles(seen, np.array([i]))
        assert torch.equal(pixels[i : i + 1], view_images(images[i : i + 1], alone, 48))
        for name in NODE_TYPES:
            np.testing.assert_array_equal(one.nodes[name].key_points, part.nodes[name].key_points)
            np.testing.assert_array_equal(one.nodes[name].tag_ids, part.nodes[name].tag_ids)
        for pair, edges in one.edges.items():
            np.testing.assert_array_equal(edges.index, part.edges[pair].index)


def test_edges_keep_joining_the_same_objects() -> None:
    graphs = make_graphs(np.random.default_rng(1).integers(0, 5, (6, 3)), 9)
    views = draw_views(AugmentSettings(crop_scale=(0.2, 0.4)), TILE_PX, 0, 0, np.arange(6))
    seen = view_graphs(graphs, views)
    for (a, b), edges in seen.edges.items():
        tile = ragged.owners(edges.offsets)
        source = edges.index[0] + seen.nodes[a].offsets[tile]
        target = edges.index[1] + seen.nodes[b].offsets[tile]
        joined = np.stack([seen.nodes[a].osm_id[source], seen.nodes[b].osm_id[target]], axis=1)
        # Every object touches every other of its tile, so every pair that is left is joined.
        n = np.diff(seen.nodes[a].offsets) * np.diff(seen.nodes[b].offsets)
        assert len(np.unique(joined, axis=0)) == len(joined) == n.sum()


def test_no_augmentation_changes_nothing() -> None:
    graphs = make_graphs(np.array([[1, 2, 3]]), 4)
    images = draw(graphs, TILE_PX)
    views = whole_views(1, TILE_PX)
    assert view_graphs(graphs, views) is graphs
    assert torch.equal(view_images(images, views, TILE_PX), torch.from_numpy(images))


def test_normalising_gives_the_statistics_and_colour_moves_brightness() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    plain = normalise(images, mean, std)
    torch.testing.assert_close(plain * std[:, None, None] + mean[:, None, None], images / 255)
    torch.testing.assert_close(normalise(images, mean, std, torch.ones(2, 3)), plain, atol=1e-5, rtol=1e-5)
    grey = normalise(images, torch.zeros(3), torch.ones(3), torch.tensor([[1.0, 1.0, 0.0]] * 2))
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    dark = normalise(images, torch.zeros(3), torch.ones(3), torch.tensor([[0.5, 1.0, 1.0]] * 2))
    torch.testing.assert_close(dark, images / 510)
    flat = normalise(images, torch.zeros(3), torch.ones(3), torch.tensor([[1.0, 0.0, 1.0]] * 2))
    luma = (images / 255).mean((2, 3)) @ torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(flat, luma[:, None, None, None].expand_as(flat))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000])
def test_a_shuffle_is_a_permutation_that_changes_with_the_epoch(n: int) -> None:
    first, second = (Shuffle(n, 5, epoch).at(np.arange(n)) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(n))
    assert n < 17 or first.tolist() != second.tolist()
    assert Shuffle(n, 5, 0).at([n - 1]) == first[-1]  # a place can be asked for alone


def test_draws_are_uniform_and_differ_by_key() -> None:
    draws = uniform(1, 2, np.arange(20000)[:, None], np.arange(2))
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03
    assert not np.array_equal(draws, uniform(1, 3, np.arange(20000)[:, None], np.arange(2)))
