"""Splits by ground: no ground, and no overlapping tile, is ever on two sides."""

from __future__ import annotations

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box

from rsosm_cli.errors import UsageError
from rsosm_cli.settings import SplitSettings
from rsosm_cli.training.splits import PARTS, Ground, ground_features, label_share, split_ground

CRS = "EPSG:32645"


def ground(columns: int = 20, rows: int = 20, *, tile: float = 100.0, stride: float = 100.0, content=None, x0=0.0):
    col, row = np.meshgrid(np.arange(columns), np.arange(rows))
    west, south = x0 + col.ravel() * stride, row.ravel() * stride
    bounds = np.column_stack([west, south, west + tile, south + tile]).astype(float)
    content = np.ones((len(bounds), 1)) if content is None else content
    return Ground(np.zeros(len(bounds), np.int64), ("a",), (CRS,), (stride,), bounds, content)


def shared_area(g: Ground, first, second) -> float:
    a, b = (shapely.union_all(shapely.box(*g.bounds_m[i].T)) for i in (first, second))
    return shapely.area(shapely.intersection(a, b))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(6, 25), st.integers(6, 25), st.sampled_from([50.0, 75.0, 100.0]), st.floats(100, 900), st.integers(0, 9)
)
def test_no_ground_is_on_two_sides(columns, rows, stride, block_m, seed):
    g = ground(columns, rows, stride=stride)
    split = split_ground(g, SplitSettings(block_m=block_m), seed)
    train, validation, test = (split.of(p) for p in PARTS)
    assert shared_area(g, train, test) == 0
    assert shared_area(g, train, validation) == 0
    assert shared_area(g, validation, test) == 0


def test_shares_and_seeds():
    g = ground(40, 40)
    first, again, other = (split_ground(g, SplitSettings(), seed) for seed in (0, 0, 1))
    assert (first.part == again.part).all()
    assert (first.part != other.part).any()
    assert [len(first.of(p)) / 1600 for p in PARTS] == pytest.approx([0.5, 0.1, 0.4], abs=0.05)
    assert first.notes == ()
    assert first.block_m == 500


def test_buffer_keeps_the_parts_apart():
    g = ground(40, 40)
    split = split_ground(g, SplitSettings(buffer_m=90), 0)
    boxes = shapely.box(*g.bounds_m.T)
    tree = shapely.STRtree(boxes[split.of("test")])
    nearest = shapely.distance(boxes[split.of("train")], tree.geometries[tree.nearest(boxes[split.of("train")])])
    assert nearest.min() >= 180


def test_parts_have_alike_classes():
    rare = np.zeros((1600, 2))
    rare[:, 0] = 1
    rare[np.random.default_rng(3).choice(1600, 60, replace=False), 1] = 1
    split = split_ground(ground(40, 40, content=rare), SplitSettings(), 0)
    shares = [rare[split.of(p), 1].sum() / 60 for p in PARTS]
    assert shares == pytest.approx([0.5, 0.1, 0.4], abs=0.1)


def test_blocks_shrink_on_small_ground_and_say_so():
    split = split_ground(ground(6, 6), SplitSettings(), 0)
    assert split.block_m == 100
    assert "shrunk from 500 m to 100 m" in split.notes[0]


def test_too_little_ground_is_a_sentence():
    with pytest.raises(UsageError, match="2 blocks of ground: too little to split"):
        split_ground(ground(2, 1), SplitSettings(), 0)


def two_cities(x0: float) -> Ground:
    a, b = ground(10, 10), ground(10, 10, x0=x0)
    return Ground(
        np.repeat([0, 1], 100), ("a", "b"), (CRS, CRS), (100.0, 100.0), np.concatenate([a.bounds_m, b.bounds_m]),
        np.ones((200, 1)),
    )  # fmt: skip


def test_by_city_keeps_shared_ground_out():
    g = two_cities(x0=850.0)  # the second city begins within the first
    split = split_ground(g, SplitSettings(by="city", test_cities=("b",)), 0)
    assert set(g.city[split.of("test")]) == {1}
    assert set(g.city[split.of("train")]) == set(g.city[split.of("validation")]) == {0}
    assert shared_area(g, split.of("train"), split.of("test")) == 0
    with pytest.raises(UsageError, match="names c, which is not among the cities"):
        split_ground(g, SplitSettings(by="city", test_cities=("c",)), 0)


def test_same_ground_at_two_scales_goes_to_one_side():
    near, far = ground(20, 20), ground(10, 10, tile=200, stride=200)
    g = Ground(
        np.repeat([0, 1], [400, 100]), ("near", "far"), (CRS, CRS), (100.0, 200.0),
        np.concatenate([near.bounds_m, far.bounds_m]), np.ones((500, 1)),
    )  # fmt: skip
    split = split_ground(g, SplitSettings(), 0)
    assert shared_area(g, split.of("train"), split.of("test")) == 0


def test_by_file(tmp_path):
    shapes = [box(0, 0, 1000, 990), box(0, 990, 1000, 1400), box(0, 1400, 2000, 2000)]
    path = tmp_path / "split.gpkg"
    geopandas.GeoDataFrame({"split": ["train", "val", "Test"]}, geometry=shapes, crs=CRS).to_file(path)
    g = ground()
    split = split_ground(g, SplitSettings(by="file", file=str(path)), 0)
    assert len(split.of("train")) == 90  # the row of tiles across the border is used by none
    assert len(split.of("test")) == 120
    features = ground_features(split.ground)["features"]
    assert {f["properties"]["split"] for f in features} == set(PARTS)


def test_smaller_label_shares_lie_within_larger_ones():
    tiles = np.arange(100, 200)
    assert set(label_share(tiles, 0.1, 0)) < set(label_share(tiles, 0.5, 0)) < set(tiles)
    assert len(label_share(tiles, 0.1, 0)) == 10
    assert len(label_share(tiles[:3], 0.1, 0)) == 1
