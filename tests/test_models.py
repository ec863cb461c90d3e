"""The GeoLink model: what changes an encoding and what must not."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from graph_batches import join, random_tile, shuffled
from torch_geometric.nn import GATConv, Set2Set

from rsosm_cli.errors import UsageError
from rsosm_cli.graph.schema import EDGE_TYPES, NODE_TYPES
from rsosm_cli.models import draws
from rsosm_cli.models.flat import flatten, segment_rank
from rsosm_cli.models.fusion import pack
from rsosm_cli.models.geolink import GeoLink, patchify, unpatchify
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.models.osm_encoder import PAIRS
from rsosm_cli.models.readout import Set2Set as OurSet2Set
from rsosm_cli.settings import ClassSettings, ModelSettings, TaskSettings

WIDTH = 16
SIZES = [(3, 4, 5), (0, 2, 0), (0, 0, 0), (7, 1, 30), (1, 0, 0)]


def settings(**values: object) -> ModelSettings:
    small = {
        "image_encoder": "vit_tiny_patch16_224", "image_size": 64, "image_depth": 2, "osm_width": 32,
        "fusion_width": 32, "fusion_heads": 4, "decoder_width": 32, "decoder_heads": 4,
        "decoder_depth": 1, "projection_width": 8,
    }  # fmt: skip
    return ModelSettings(**{**small, **values})


def build(**values: object) -> GeoLink:
    torch.manual_seed(0)
    return GeoLink(settings(**values), WIDTH).eval()


@pytest.fixture(scope="module")
def tiles() -> list:
    return [random_tile(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(len(SIZES), 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gat", "gcn", "transformer"])
def test_encodings_do_not_depend_on_mates_order_or_chance(tiles, images, kind):
    model = build(osm_encoder=kind)
    with torch.no_grad():
        together = model.encode(images, join(tiles), maps=True)
        assert all(torch.isfinite(x).all() for x in (together.osm, together.fused, together.image, together.fused_map))
        again = model.encode(images, join([shuffled(tile, 5) for tile in tiles]), maps=True)
        torch.testing.assert_close(again.fused_map, together.fused_map, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again.osm, together.osm, atol=1e-5, rtol=1e-4)
        for i, tile in enumerate(tiles):
            alone = model.encode(images[i : i + 1], join([tile]))
            torch.testing.assert_close(alone.fused[0], together.fused[i], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(alone.osm[0], together.osm[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.encode(images, join(tiles)).fused, together.fused, atol=0, rtol=0)


def test_a_batch_mate_that_loses_its_last_edge_changes_nothing(tiles, images):
    model = build()
    changed = random_tile(SIZES[3], 3)
    for edge in EDGE_TYPES:
        changed[edge].edge_index = changed[edge].edge_index[:, :0]
        changed[edge].edge_attr = changed[edge].edge_attr[:0]
    with torch.no_grad():
        before = model.encode(images, join(tiles))
        after = model.encode(images, join([*tiles[:3], changed, tiles[4]]))
    rest = [0, 1, 2, 4]
    torch.testing.assert_close(after.fused[rest], before.fused[rest], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(after.osm[rest], before.osm[rest], atol=1e-6, rtol=1e-5)
    assert (after.osm[3] - before.osm[3]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["gat", "gcn", "transformer"])
def test_relations_and_graphs_matter(tiles, images, kind):
    model = build(osm_encoder=kind)
    permuted = join(tiles)
    for edge in EDGE_TYPES:
        permuted[edge].edge_attr = permuted[edge].edge_attr.roll(1, 1)
    exchanged = join([tiles[3], *tiles[1:3], tiles[0], tiles[4]])
    with torch.no_grad():
        before = model.encode(images, join(tiles))
        assert (model.encode(images, permuted).osm - before.osm).abs().max() > 1e-5
        assert (model.encode(images, exchanged).fused[0] - before.fused[0]).abs().max() > 1e-4
        deaf = build(osm_encoder=kind, edge_dim=False)
        torch.testing.assert_close(deaf.encode(images, permuted).osm, deaf.encode(images, join(tiles)).osm)


def test_each_modality_alone(tiles, images):
    model = build()
    with torch.no_grad():
        both = model.encode(images, join(tiles))
        image = model.encode(images, None, maps=True)
        osm = model.encode(None, join(tiles))
    torch.testing.assert_close(image.image, both.image)
    torch.testing.assert_close(osm.osm, both.osm)
    assert (image.fused, image.osm, osm.image, osm.fused) == (None, None, None, None)
    assert image.image_map.shape == (5, 192, 4, 4)
    with pytest.raises(ValueError, match="images, graphs or both"):
        model.encode(None, None)


@pytest.mark.parametrize("kind", ["gat", "gcn", "transformer"])
@pytest.mark.parametrize("which", [[0, 1, 2, 3, 4], [2], [1, 4], [2, 2]])
def test_losses_and_all_gradients_are_finite(tiles, images, kind, which):
    model = build(osm_encoder=kind).train()
    found = model.losses(images[which], join([tiles[i] for i in which]), seeds=torch.arange(len(which)))
    found.total.backward()
    assert torch.isfinite(torch.stack((found.image, found.contrastive, found.node, found.total))).all()
    # A distributed run waits for the gradient of every parameter, also of a rank without any object.
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert [name for name, grad in grads.items() if not torch.isfinite(grad).all()] == []
    if which == [2]:
        assert found.contrastive == found.node == 0


@pytest.mark.parametrize("kind", ["gat", "gcn", "transformer"])
def test_bfloat16_is_near(tiles, images, kind):
    model = build(osm_encoder=kind)
    seeds = torch.arange(5)
    exact = model.losses(images, join(tiles), seeds=seeds)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.losses(images, join(tiles), seeds=seeds)
        encoded = model.encode(images, join(tiles), maps=True)
        head = TaskModel(model, task(decoder="upernet"))(images, join(tiles))
    found.total.backward()
    for a, b in ((found.image, exact.image), (found.contrastive, exact.contrastive), (found.node, exact.node)):
        assert a.item() == pytest.approx(b.item(), rel=0.03)
    assert torch.isfinite(encoded.fused_map).all()
    assert torch.isfinite(head).all()


def test_masks_are_a_function_of_the_sample_alone(tiles):
    model = build(mask_nodes=0.3)
    seeds = draws.sample_seeds(7, 3, torch.arange(100, 105))
    graph = flatten(join(tiles))
    masks = model.draw_masks(seeds, graph, 16)
    assert masks.keep.shape == (5, 4)
    hidden = np.zeros((5, 3), int)
    np.add.at(hidden, (graph.batch[masks.nodes].numpy(), graph.kind[masks.nodes].numpy()), 1)
    # 30 % of each type and graph, rounded, at least one where there is any.
    assert hidden.tolist() == [[1, 1, 2], [0, 1, 0], [0, 0, 0], [2, 1, 9], [1, 0, 0]]
    assert masks.totals.tolist() == hidden.sum(1).tolist()
    for i in (0, 3):
        mine = flatten(tiles[i])
        alone = model.draw_masks(seeds[i : i + 1], mine, 16)
        assert torch.equal(alone.keep[0], masks.keep[i])
        assert torch.equal(alone.nodes, masks.nodes[graph.batch == i])
    other = model.draw_masks(draws.sample_seeds(7, 4, torch.arange(100, 105)), graph, 16)
    assert not torch.equal(other.keep, masks.keep)


def test_draws_are_even():
    noise = draws.mix(draws.sample_seeds(0, 0, torch.arange(200))[:, None], torch.arange(500)).double()
    share = (noise * 2.0**-64 + 0.5).numpy()  # in 0..1
    assert abs(share.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(share[:, 0], share[:, 1])[0, 1]) < 0.25
    counts = np.histogram(share, bins=20, range=(0, 1))[0]
    assert counts.min() > 0.95 * counts.mean()


def test_objects_max_draws_a_subset_while_pretraining(tiles, images):
    model = build(mask_nodes=0.5, objects_max=3)
    graph = flatten(join(tiles))
    masks = model.draw_masks(torch.arange(5), graph, 16)
    fused = np.bincount(graph.batch[masks.fused].numpy(), minlength=5)
    assert fused.tolist() == masks.totals.tolist() == [3, 1, 0, 3, 1]
    assert not (masks.fused & ~masks.nodes).any()
    found = model.losses(images, join(tiles), masks=masks)
    assert int(found.node_valid.sum()) == 8


def test_other_sizes_bands_and_patches(tiles):
    model = build(in_chans=5)
    graphs = join(tiles[:2])
    images = torch.randn(2, 5, 48, 96)
    with torch.no_grad():
        found = model.encode(images, graphs, maps=True)
    assert found.fused_map.shape == (2, 32, 3, 6)
    assert torch.isfinite(model.losses(images, graphs, seeds=torch.arange(2)).total)
    with pytest.raises(UsageError, match="50 x 64 pixels cannot be cut into the patches of 16"):
        model.encode(torch.randn(2, 5, 50, 64), None)
    with pytest.raises(ValueError, match=r"\(B, 5, H, W\)"):
        model.encode(torch.randn(2, 3, 64, 64), None)
    with pytest.raises(UsageError, match="no model named"):
        build(image_encoder="vit_none")
    with pytest.raises(UsageError, match="not a ViT"):
        build(image_encoder="resnet18")
    with pytest.raises(UsageError, match="has 12 blocks, fewer than image_depth: 13"):
        build(image_depth=13)


def test_position_follows_the_ground_sample_distance(images):
    plain, scaled = build(), build(gsd_position=True)
    with torch.no_grad():
        torch.testing.assert_close(
            scaled.encode(images, None, gsd_m=1.0).image, plain.encode(images, None).image, atol=1e-5, rtol=1e-4
        )
        each = scaled.encode(images, None, gsd_m=torch.tensor([0.3, 0.6, 1.0, 1.0, 1.0])).image
        torch.testing.assert_close(each[1:2], scaled.encode(images[1:2], None, gsd_m=0.6).image, atol=1e-5, rtol=1e-4)
        assert (each[0] - plain.encode(images, None).image[0]).abs().max() > 1e-3
    with pytest.raises(UsageError, match="ground sample distance"):
        scaled.encode(images, None)


def test_the_fusion_sees_where_objects_are(tiles, images):
    graphs = join(tiles)
    mirrored = join(tiles)
    for t in NODE_TYPES:
        mirrored[t].pos = torch.stack((1 - graphs[t].pos[..., 0], graphs[t].pos[..., 1]), -1)
    for position, differs in ((True, True), (False, False)):
        model = build(fusion_position=position)
        with torch.no_grad():
            a, b = model.encode(images, graphs).fused, model.encode(images, mirrored).fused
        assert ((a - b).abs().max() > 1e-4) == differs


@pytest.mark.parametrize(("values", "moves"), [("content", False), ("position", True)])
def test_where_a_lone_object_is_reaches_the_patches_with_placed_values(images, values, moves):
    model = build(fusion_values=values)
    tile, moved = (random_tile((0, 0, 1), 0) for _ in range(2))
    moved["polygon"].pos = 1 - moved["polygon"].pos
    with torch.no_grad():
        here, there = (model.encode(images[:1], join([t]), maps=True).fused_map for t in (tile, moved))
    # Attention over one object is one, wherever it is: published values hand on what it is, not where.
    assert bool((here - there).abs().amax() > 1e-3) == moves


def test_gat_equals_nine_convolutions_of_pyg(tiles):
    model = build(osm_norm="batch")
    graphs = join(tiles)
    graph = flatten(graphs)
    layer = model.osm_encoder.layer
    out = {t: [] for t in NODE_TYPES}
    for i, (a, b) in enumerate(PAIRS):
        s, t = NODE_TYPES.index(a), NODE_TYPES.index(b)
        edge = graphs[a, "to", b]
        conv = GATConv(WIDTH, 32, add_self_loops=False, edge_dim=edge.edge_attr.shape[1])
        with torch.no_grad():
            conv.lin.weight.copy_(layer.weight[s, t])
            conv.att_src.copy_(layer.att_source[s, t])
            conv.att_dst.copy_(layer.att_target[s, t])
            conv.att_edge.copy_(layer.att_relation[i])
            conv.lin_edge.weight.copy_(layer.relations.tables[f"{a}__{b}"].T)
            out[b].append(conv((graphs[a].x, graphs[b].x), edge.edge_index, edge.edge_attr))
    expected = torch.cat([torch.stack(out[t]).mean(0) for t in NODE_TYPES])
    torch.testing.assert_close(layer(graph.x, graph).detach(), expected, atol=1e-5, rtol=1e-4)


def test_set2set_equals_pyg():
    torch.manual_seed(0)
    ours, theirs = OurSet2Set(8, n_sets=1), Set2Set(8, processing_steps=5)
    with torch.no_grad():
        for name, part in (("ih", "input"), ("hh", "state")):
            for kind in ("weight", "bias"):
                getattr(theirs.lstm, f"{kind}_{name}_l0").copy_(getattr(ours, f"{kind}_{part}")[0])
        x, batch = torch.randn(12, 8), torch.tensor([0] * 5 + [1] * 4 + [3] * 3)
        torch.testing.assert_close(ours(x, batch, 4)[0], theirs(x, batch, dim_size=4), atol=1e-5, rtol=1e-4)


def test_padding_is_bounded_without_dropping():
    sizes = [(0, 0, 3)] * 30 + [(100, 200, 300)]
    graph = flatten(join([random_tile(size, i, density=0.0) for i, size in enumerate(sizes)]))
    packs = pack(graph, graph.totals)
    assert sum(p.index.numel() for p in packs) <= 2 * graph.n_nodes + 16 * graph.n_graphs
    seen = torch.cat([p.index[p.valid] for p in packs])
    assert sorted(seen.tolist()) == list(range(graph.n_nodes))


def test_bucketed_fusion_equals_one_bucket(images):
    sizes = [(0, 0, 3), (0, 1, 0), (40, 50, 60), (0, 0, 0), (2, 2, 2)]
    graphs = join([random_tile(size, i, density=0.05) for i, size in enumerate(sizes)])
    assert len(pack(flatten(graphs), flatten(graphs).totals)) > 1
    model = build()
    with torch.no_grad():
        together = model.encode(images, graphs).fused
        for i, size in enumerate(sizes):
            alone = model.encode(images[i : i + 1], random_tile(size, i, density=0.05)).fused
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    found = build().train().losses(images, graphs, seeds=torch.arange(5))
    assert torch.isfinite(found.total)


def test_rank_within_segments():
    keys, segment = torch.tensor([5, 3, 9, -1, 4]), torch.tensor([0, 0, 2, 2, 2])
    assert segment_rank(keys, segment, 3).tolist() == [1, 0, 2, 0, 1]


def test_patches_and_back():
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, 2, 3), images)


def gradients(model: GeoLink, images: torch.Tensor, tiles: list) -> list[torch.Tensor]:
    model.losses(images, join(tiles), seeds=torch.arange(5)).total.backward()
    return [p.grad for p in model.parameters()]


def test_blocks_computed_again_give_the_same_gradients(tiles, images):
    plain, again = build(fusion_dropout=0.0).train(), build(fusion_dropout=0.0).train()
    again.vit.checkpointing = True
    for a, b in zip(gradients(plain, images, tiles), gradients(again, images, tiles), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_compiled_encoder_gives_the_same_gradients(tiles, images):
    plain, compiled = build(fusion_dropout=0.0).train(), build(fusion_dropout=0.0).train()
    compiled.vit.compile(dynamic=False)
    for a, b in zip(gradients(plain, images, tiles), gradients(compiled, images, tiles), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_register_tokens_are_no_patches():
    model = GeoLink(settings(image_encoder="vit_small_patch14_reg4_dinov2", image_size=56, image_depth=1), WIDTH)
    with torch.no_grad():
        assert model.encode(torch.randn(1, 3, 56, 56), None, maps=True).image_map.shape == (1, 384, 4, 4)
    assert "vit_small_patch14_reg4_dinov2" in timm.list_models()


def task(**values: object) -> TaskSettings:
    classes = (
        () if values.get("kind") == "regression" else tuple(ClassSettings(name=n, colour="#000000") for n in "abc")
    )
    return TaskSettings(name="t", classes=classes, decoder_width=24, **values)


@pytest.mark.parametrize("decoder", ["upernet", "linear", "mlp"])
@pytest.mark.parametrize("modality", ["image", "osm", "fused"])
@pytest.mark.parametrize("kind", ["segmentation", "regression"])
def test_heads(tiles, images, decoder, modality, kind):
    model = TaskModel(build(), task(decoder=decoder, modality=modality, kind=kind)).train()
    given = (None if modality == "osm" else images, None if modality == "image" else join(tiles))
    out = model(*given)
    assert out.shape == ((5, 3, 64, 64) if kind == "segmentation" else (5,))
    out.square().mean().backward()
    # Whatever is trained has a gradient, and what the modality does not see is not trained.
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    grads = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and n.startswith("encoder.")}
    assert ("vit" in grads) == (modality != "osm")
    assert ("osm_encoder" in grads) == (modality != "image")
    model.eval()
    with torch.no_grad():
        coarse = model.coarse(*given)
    if kind == "segmentation":
        assert coarse.shape[2] * model.stride == 64


def test_osm_segmentation_has_a_map_without_an_image(tiles, images):
    model = TaskModel(build(), task(decoder="linear", modality="osm")).eval()
    with torch.no_grad():
        blind = model(None, join(tiles))
        seeing = model(images, join(tiles))
    torch.testing.assert_close(blind, seeing)
    assert blind[0].flatten(1).std(1).min() > 1e-3  # it varies over the tile
