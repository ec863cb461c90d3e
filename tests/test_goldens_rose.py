"""Rose against golden values of the published code (see the folder's README)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens_of_geolink import released_state

from rsosm_cli.models.rose import ObjectGraphs, Rose, RoseMasks
from rsosm_cli.settings import RoseSettings

# Published names of the model's parts, and ours.
SAME = {
    "img_encoder.patch_embed.proj.": "vit.patch_embed.",
    "img_encoder.blocks.": "vit.blocks.",
    "img_norm.": "vit.norm.",
    "osm_encoder.gcn1.att_src": "osm_encoder.att_source",
    "osm_encoder.gcn1.att_dst": "osm_encoder.att_target",
    "osm_encoder.gcn1.bias": "osm_encoder.bias",
    "osm_encoder.gcn1.lin.weight": "osm_encoder.weight",
    "osm_norm.": "norm_",
    "img_decoder_mlp.": "patches_in.",
    "osm_decoder_mlp.": "region_in.",
    "osm_node_decoder_mlp.": "objects_in.",
    "img_cross_modal_decoder.0.": "decoder.",
    "img_decoder_norm.": "decoder_norm.",
    "img_decoder_pred.": "predict_pixels.",
    "osm_decoder_norm.": "node_norm.",
    "osm_decoder_pred.": "predict_node.",
    "osm_read_out.lstm.weight_ih_l0": "readout.weight_input",
    "osm_read_out.lstm.weight_hh_l0": "readout.weight_state",
    "osm_read_out.lstm.bias_ih_l0": "readout.bias_input",
    "osm_read_out.lstm.bias_hh_l0": "readout.bias_state",
    "cls_token": "vit.cls_token",
    "img_mask_token": "patch_token",
    "osm_mask_token": "node_token",
}
BLOCK = {
    "self_attn.": "objects_self.", "cross_attn_token_to_image.": "patches_to_objects.",
    "cross_attn_image_to_token.": "objects_to_patches.", "norm1.": "norm_self.", "norm2.": "norm_patches.",
    "norm3.": "norm_objects.", "norm4.": "norm_out.", "mlp.": "linear.",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out",
}  # fmt: skip


def our_name(name: str) -> str | None:
    blocks = {"img_cross_modal_encoder.0.": "image_fusion.", "osm_cross_modal_encoder.0.": "node_fusion."}
    for theirs, ours in blocks.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            for a, b in BLOCK.items():
                rest = rest.replace(a, b)
            return ours + rest
    for theirs, ours in SAME.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "rose"


@pytest.fixture(scope="module")
def model(goldens: Path) -> Rose:
    spec = json.loads((goldens / "weights_spec_w002.json").read_text())
    model = Rose(RoseSettings(image_encoder="vit_tiny_patch16_224", osm_norm="batch"), 512).eval()
    own = model.state_dict()
    state = {our_name(n): t for n, t in released_state(spec["rows"]).items() if our_name(n) is not None}
    assert set(state) == set(own)
    model.load_state_dict({n: t.view(own[n].shape) for n, t in state.items()})
    return model


@pytest.fixture(scope="module")
def inputs(goldens: Path) -> tuple[torch.Tensor, ObjectGraphs]:
    return read_inputs(np.load(goldens / "inputs.npz"), (0, 1, 2))


def read_inputs(data: np.lib.npyio.NpzFile, which: tuple[int, ...]) -> tuple[torch.Tensor, ObjectGraphs]:
    sizes = [len(data[f"x_{i}"]) for i in which]
    first = np.cumsum([0, *sizes])
    graphs = ObjectGraphs(
        # The last column is the class code, which the model does not see.
        x=torch.from_numpy(np.concatenate([data[f"x_{i}"][:, :-1] for i in which])),
        edge_index=torch.from_numpy(
            np.concatenate([data[f"edge_index_{i}"] + f for i, f in zip(which, first, strict=False)], 1)
        ),
        batch=torch.arange(len(which)).repeat_interleave(torch.tensor(sizes)),
        n_graphs=len(which),
        counts=np.array(sizes),
    )
    return torch.from_numpy(data["imgs"][list(which)]), graphs


def test_encodings(goldens, model, inputs):
    images, graphs = inputs
    gold = np.load(goldens / "pretrain_w002.npz")
    with torch.no_grad():
        nodes = model.encode_objects(graphs.x, graphs, 14, 14)
        np.testing.assert_allclose(nodes, gold["osm_norm_unmasked"], atol=1e-4)
        np.testing.assert_allclose(model.read(nodes, graphs), gold["set2set"], atol=1e-4)
        tokens = model.vit(images[:1])
    np.testing.assert_allclose(tokens.patches[0], gold["img_tokens_full_sample0"][1:], atol=1e-4)


def test_what_the_heads_read(goldens, model, inputs):
    gold = np.load(goldens / "heads_w002.npz")
    with torch.no_grad():
        found = model.encode(*inputs, maps=True)
    vectors = {"PopLinear": found.image, "PopOSMLinear": found.osm, "PopFusionLinear": found.fused}
    maps = {"MySegmenter_linear": found.image_map, "MyFusionSegmenter_linear": found.fused_map}
    seen = vectors | {head: m.flatten(2).transpose(1, 2) for head, m in maps.items()}
    for head, value in seen.items():
        np.testing.assert_allclose(value, gold[f"{head}__decoder_in"], atol=1e-4, err_msg=head)
    # The linear heads themselves, with the golden weights.
    spec = json.loads((goldens / "decoder_spec_w002.json").read_text())
    for head, ours in (("MySegmenter", "MySegmenter_linear"), ("PopFusionLinear", "PopFusionLinear")):
        rows = spec[f"{head}/{'DecoderLinear' if 'Segmenter' in head else 'Linear'}"]
        weight, bias = released_state(rows).values()
        out = torch.nn.functional.linear(seen[ours], weight, bias).squeeze()
        expected = gold[f"{ours}__decoder_out"]
        expected = expected.reshape(3, 9, 196).transpose(0, 2, 1) if expected.ndim == 4 else expected[:, 0]
        np.testing.assert_allclose(out, expected, atol=1e-4, err_msg=head)


def test_losses_and_gradients(goldens, model, inputs):
    gold = np.load(goldens / "pretrain_w002.npz")
    masks = RoseMasks(torch.from_numpy(gold["ids_keep"]), torch.from_numpy(gold["mask_nodes"]))
    found = model.losses(*inputs, masks=masks)
    assert found.image.item() == pytest.approx(float(gold["img_loss"]), rel=1e-4)
    assert found.node.item() == pytest.approx(float(gold["osm_loss"]), rel=1e-4)
    np.testing.assert_allclose(found.node_prediction.detach(), gold["pred_osm"], atol=1e-4)
    np.testing.assert_allclose(found.image_prediction[0].detach(), gold["pred_img_sample0"], atol=1e-4)
    found.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    expected = json.loads((goldens / "pretrain_grads_w002.json").read_text())["grads"]
    for name, (norm, _) in expected.items():
        assert grads[our_name(name)].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def test_a_tile_does_not_depend_on_its_mates(goldens, inputs):
    data = np.load(goldens / "inputs.npz")
    torch.manual_seed(0)
    model = Rose(RoseSettings(image_encoder="vit_tiny_patch16_224"), 512).eval()
    with torch.no_grad():
        together = model.encode(*inputs)
        alone = model.encode(*read_inputs(data, (1,)))
    for part in ("image", "osm", "fused"):
        torch.testing.assert_close(getattr(alone, part)[0], getattr(together, part)[1], atol=1e-5, rtol=1e-4)
    seeds = torch.tensor([3, 4, 5])
    masks = model.draw_masks(seeds, inputs[1], 196)
    assert torch.equal(model.draw_masks(seeds[:1], read_inputs(data, (0,))[1], 196).keep[0], masks.keep[0])
    assert inputs[1].batch[masks.nodes].bincount().tolist() == [1, 2, 3]
