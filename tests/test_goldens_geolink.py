"""The model under `compat: released` against golden values of the published code (see the folder's README)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens_of_geolink import read_graphs, read_images, released_state
from torch_geometric.data import HeteroData

from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.models.flat import flatten
from rsosm_cli.models.geolink import GeoLink, Masks
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.models.released import from_released, from_released_vit
from rsosm_cli.settings import ClassSettings, ModelSettings, TaskSettings

ORDER = ("polygon", "line", "point")  # of objects in the released fusion


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "geolink"


@pytest.fixture(scope="module")
def images(shared: Path, goldens: Path) -> torch.Tensor:
    return read_images(goldens, shared / "data" / "geolink_ufz")


@pytest.fixture(scope="module")
def names(goldens: Path) -> list[str]:
    return [str(name) for name in np.load(goldens / "batch6_index.npz")["sample_names"]]


@pytest.fixture(scope="module")
def graphs(shared: Path, names: list[str]) -> HeteroData:
    return read_graphs(shared / "data" / "geolink_ufz", names)


def build(goldens: Path, **settings: object) -> GeoLink:
    spec = json.loads((goldens / "weights_spec_w002.json").read_text())
    chosen = {"compat": "released", "objects_max": None, **settings}
    model = GeoLink(ModelSettings(image_encoder="vit_tiny_patch16_224", **chosen), 512)
    imported = from_released(released_state(spec["rows"]))
    model.load_state_dict(imported.state)
    return model.eval()


def rows_of(kind: str, graph, order: torch.Tensor | None = None) -> slice:
    first = graph.offsets[NODE_TYPES.index(kind)]
    return slice(first, first + graph.sizes[NODE_TYPES.index(kind)])


def test_objects_and_fused_maps(goldens, images, graphs, names, shared):
    model = build(goldens)
    gold = np.load(goldens / "fusion_w002.npz")
    graph = flatten(graphs)
    with torch.no_grad():
        raw = model.osm_encoder.layer(graph.x, graph).relu()
        normed = model.osm_encoder.norm(raw, graph)
        tokens, position = model._objects(normed, graph, 14, 14)
        for t in NODE_TYPES:
            rows = rows_of(t, graph)
            np.testing.assert_allclose(raw[rows], gold[f"gat_relu__{t}"], atol=1e-5)
            np.testing.assert_allclose(normed[rows], gold[f"gat_norm__{t}"], atol=1e-4)
            np.testing.assert_allclose(position[rows], gold[f"node_pos_embed__{t}"], atol=1e-5)
            np.testing.assert_allclose(tokens[rows], gold[f"node_token__{t}"], atol=1e-4)
        found = model.encode(images, graphs, maps=True, levels=(2, 5, 8, 11))
        for level, number in zip(found.levels, (2, 5, 8), strict=False):
            np.testing.assert_allclose(level, gold[f"out_{number}"], atol=1e-4)
        np.testing.assert_allclose(
            found.levels[3].flatten(2).transpose(1, 2), gold["vit_block11_tokens_no_cls"], atol=1e-4
        )
        np.testing.assert_allclose(found.fused_map, gold["out_fused11"], atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "graph"])
def test_each_tile_alone(goldens, images, graphs, names, shared, norm):
    model = build(goldens, osm_norm=norm)
    gold = np.load(goldens / "fusion_w002.npz")
    with torch.no_grad():
        together = model.encode(images, graphs, maps=True).fused_map
        for i, name in enumerate(names):
            alone = read_graphs(shared / "data" / "geolink_ufz", [name])
            found = model.encode(images[i : i + 1], alone, maps=True).fused_map
            np.testing.assert_allclose(found, gold[f"fused11_single_{i}"], atol=1e-4)
            if norm == "graph":
                np.testing.assert_allclose(together[i : i + 1], gold[f"fused11_single_{i}"], atol=1e-4)


def test_fifty_objects_at_most(goldens, images, graphs):
    model = build(goldens)
    gold = np.load(goldens / "fusion_w002.npz")
    graph = flatten(graphs)
    # The released order of a tile's objects, in which the permutation was drawn.
    by_type = torch.cat([torch.arange(graph.n_nodes)[rows_of(t, graph)] for t in ORDER])
    chosen = torch.ones(graph.n_nodes, dtype=torch.bool)
    drawn = iter(sorted(k for k in gold.files if k.startswith("cap50_perm_")))
    for tile in range(graph.n_graphs):
        mine = by_type[graph.batch[by_type] == tile]
        if len(mine) > 50:
            chosen[mine[gold[next(drawn)][50:]]] = False
    with torch.no_grad():
        tokens = model.vit(images)
        nodes = model.osm_encoder(graph.x, graph)
        totals = np.bincount(graph.batch[chosen].numpy(), minlength=graph.n_graphs)
        hybrid = model.fuse(model.patches_in(tokens.patches), nodes, graph, 14, 14, chosen=chosen, totals=totals)
    np.testing.assert_allclose(hybrid.transpose(1, 2).unflatten(2, (14, 14)), gold["fused11_cap50_seed123"], atol=1e-4)


def test_losses_and_gradients(goldens, images, graphs):
    model = build(goldens)
    gold = np.load(goldens / "pretrain_w002_nocap.npz")
    graph = flatten(graphs)
    hidden = torch.zeros(graph.n_nodes, dtype=torch.bool)
    for t in NODE_TYPES:
        hidden[torch.from_numpy(gold[f"mask_nodes__{t}"]) + graph.offsets[NODE_TYPES.index(t)]] = True
    totals = np.bincount(graph.batch[hidden].numpy(), minlength=graph.n_graphs)
    masks = Masks(torch.from_numpy(gold["ids_keep"]), hidden, hidden, totals)
    found = model.losses(images, graphs, masks=masks)
    for ours, theirs in ((found.image, "img_loss"), (found.contrastive, "contrastive_loss"), (found.node, "node_loss")):
        assert ours.item() == pytest.approx(float(gold[theirs]), rel=1e-5)
    np.testing.assert_allclose(found.region.detach(), gold["osm_aggr"], atol=1e-5)
    np.testing.assert_allclose(found.osm_projection.detach(), gold["osm_con"], atol=1e-5)
    np.testing.assert_allclose(found.image_projection.detach(), gold["img_con"], atol=1e-5)
    np.testing.assert_allclose(found.image_prediction[0].detach(), gold["pred_img_sample0"], atol=1e-4)

    (found.image + found.contrastive + found.node).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    spec = json.loads((goldens / "weights_spec_w002.json").read_text())
    expected = json.loads((goldens / "pretrain_grads_w002.json").read_text())["grads"]
    # Which of our elements a released tensor becomes: number the released elements and import the numbers.
    numbered, first = {}, 0
    for name, shape, _ in spec["rows"]:
        size = int(np.prod(shape))
        numbered[name] = torch.arange(first, first + size, dtype=torch.float64).view(shape)
        first += size
    place = from_released(numbered).state
    flat = torch.zeros(first, dtype=torch.float64)
    for ours, where in place.items():
        flat[where.long().flatten()] = grads[ours].double().flatten()
    compared = 0
    for name, (norm, total) in expected.items():
        if name.startswith("type_attention"):
            continue  # left: it has no effect in the released code
        grad = flat[numbered[name].long().flatten()]
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-8), name
        assert grad.sum().item() == pytest.approx(total, rel=1e-3, abs=1e-4 * max(norm, 1e-3) * len(grad) ** 0.5), name
        compared += 1
    assert compared == len(expected) - 2


def test_image_encoder_alone(goldens, images):
    spec = json.loads((goldens / "weights_spec_unimodal_w002.json").read_text())
    gold = np.load(goldens / "unimodal_vit_w002.npz")
    model = GeoLink(ModelSettings(image_encoder="vit_tiny_patch16_224"), 384)
    state = from_released_vit(released_state(spec["rows"])).state
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("vit.")]
    np.testing.assert_allclose(model.vit.position, gold["pos_embed"][0, 1:], atol=1e-5)
    model.vit.norm.eps = 1e-6  # timm's; the published whole model, whose norm ours is, has torch's 1e-5
    with torch.no_grad():
        found = model.eval().encode(images, None, maps=True)
    np.testing.assert_allclose(found.cls, gold["tokens"][:, 0], atol=1e-4)
    np.testing.assert_allclose(found.image_map.flatten(2).transpose(1, 2), gold["tokens"][:, 1:], atol=1e-4)


def upernet_name(name: str) -> str:
    """Our name of a tensor of the published UPerNet."""
    for theirs, ours in (
        ("neck.ops.", "rescale."),
        ("bottleneck.", "bottleneck."),
        ("lateral_convs.", "lateral."),
        ("fpn_convs.", "smooth."),
        ("fpn_bottleneck.", "merge."),
        ("conv_seg.", "classify."),
    ):
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            # Our second level is a layer, theirs a sequence of one.
            return ours + (rest.replace("1.0.", "1.", 1) if ours == "rescale." and rest.startswith("1.0.") else rest)
    pool, layer, part = name.removeprefix("psp_modules.").split(".")
    return f"pools.{pool}.{int(layer) - 1}.{part}"


def test_upernet(goldens, images, graphs):
    spec = json.loads((goldens / "weights_spec_upernet_w002.json").read_text())
    gold = np.load(goldens / "upernet_w002.npz")
    state = released_state(spec["rows"], strip="encoder.")
    encoder = GeoLink(ModelSettings(image_encoder="vit_tiny_patch16_224", compat="released"), 512)
    inner = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
    imported = from_released({n.replace("fusion_blocks.", "osm_cross_modal_encoder."): v for n, v in inner.items()})
    missing, unexpected = encoder.load_state_dict(imported.state, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} <= {"pretraining", "readout"}
    classes = tuple(ClassSettings(name=f"c{i}", colour="#000000") for i in range(9))
    model = TaskModel(encoder, TaskSettings(name="ufz", classes=classes), levels=(2, 5, 8)).eval()
    model.head.load_state_dict(
        {upernet_name(n): v for n, v in state.items() if not n.startswith("encoder.") and "num_batches" not in n},
        strict=False,
    )
    with torch.no_grad():
        maps = model._maps(images, graphs, None)  # of all six: the published norm runs over the batch
        coarse = model.head([level[:2] for level in maps])
        model.coarse = lambda *inputs, **options: coarse  # seconds of convolutions, once
        full = model(images, graphs)
    np.testing.assert_allclose(coarse, gold["conv_seg_out"][:2], atol=1e-4)
    np.testing.assert_allclose(full[0, :, :8], gold["logits_sample0_rows0_8"], atol=1e-4)
    assert (full.argmax(1).numpy() == gold["upsampled_argmax"][:2]).mean() > 0.9999
