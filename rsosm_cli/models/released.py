"""The released GeoLink weights: from their names to ours, with what was left and why.

PyG 2.4, which wrote them, stored each convolution's one projection twice (``lin_src`` and ``lin_dst``, equal); later
PyG stores ``lin``. Both are taken. ``docs/methods.md`` describes the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rsosm_cli.errors import FormatError
from rsosm_cli.graph.schema import NODE_TYPES

_COMPUTED = "a fixed sine-cosine table, computed here for the size at hand"
_TIMM_UNUSED = "the released model never uses it: it has a cls token, positions and a last norm of its own"

# Released name to ours, where the tensor is taken as it is.
_SAME = {
    "cls_token": "vit.cls_token",
    "img_encoder.patch_embed.proj": "vit.patch_embed",
    "img_encoder.blocks": "vit.blocks",
    "img_norm": "vit.norm",
    "img_mask_token": "pretraining.patch_token",
    "img_decoder_mlp": "pretraining.decoder_in",
    "img_cross_modal_decoder": "pretraining.decoder",
    "img_decoder_norm": "pretraining.decoder_norm",
    "img_decoder_pred": "pretraining.predict_pixels",
    "osm_graph_consistency_prj": "pretraining.project_osm",
    "img_consistency_prj": "pretraining.project_image",
    "osm_node_pred": "pretraining.predict_node",
    "img_fusion_mlp": "patches_in",
    **{f"osm_node_fusion_mlp.{t}": f"objects_in.{i}" for i, t in enumerate(NODE_TYPES)},
    "osm_cross_modal_encoder.0.norm1": "fusion.norm_self",
    "osm_cross_modal_encoder.0.norm2": "fusion.norm_patches",
    "osm_cross_modal_encoder.0.norm3": "fusion.norm_objects",
    "osm_cross_modal_encoder.0.norm4": "fusion.norm_out",
    "osm_cross_modal_encoder.0.mlp": "fusion.linear",
}
# In the released block the "tokens" are the image's patches.
_ATTENTION = {
    "self_attn": "objects_self",
    "cross_attn_token_to_image": "patches_to_objects",
    "cross_attn_image_to_token": "objects_to_patches",
}
_LSTM = {
    "weight_ih_l0": "weight_input",
    "weight_hh_l0": "weight_state",
    "bias_ih_l0": "bias_input",
    "bias_hh_l0": "bias_state",
}
_LEFT = {
    "img_pos_embed": _COMPUTED,
    "rec_img_pos_embed": _COMPUTED,
    "fusion_img_pos_embed": _COMPUTED,
    "img_encoder.cls_token": _TIMM_UNUSED,
    "img_encoder.pos_embed": _TIMM_UNUSED,
    "img_encoder.norm.weight": _TIMM_UNUSED,
    "img_encoder.norm.bias": _TIMM_UNUSED,
    "type_attention.weight": "the released softmax over one element ignores it: the types are summed",
    "type_attention.bias": "the released softmax over one element ignores it: the types are summed",
    "patch_embed.proj.weight": "a second name of img_encoder.patch_embed.proj.weight",
    "patch_embed.proj.bias": "a second name of img_encoder.patch_embed.proj.bias",
}
_TIMM_KEPT = ("cls_token", "patch_embed.proj.", "blocks.", "norm.", "reg_token")


@dataclass(frozen=True)
class Imported:
    """``state`` under our names, ``read`` released names, ``left`` released names with the reason each was left."""

    state: dict[str, Tensor]
    read: tuple[str, ...]
    left: dict[str, str]


def is_multimodal(names: Mapping[str, object]) -> bool:
    """Return whether released ``names`` are of the whole model, not of the image encoder alone."""
    return any(name.startswith("img_encoder.") for name in names)


def from_released(released: Mapping[str, Tensor]) -> Imported:
    """Return the whole model's tensors under our names; unknown names are left, and said."""
    state: dict[str, Tensor] = {}
    read: list[str] = []
    left: dict[str, str] = {}
    stacks: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for name, value in released.items():
        taken = _take(name, value, released, state, stacks)
        if taken == "":
            read.append(name)
        else:
            left[name] = taken
    for ours, parts in stacks.items():
        depth = len(next(iter(parts)))
        wanted = {(i,) for i in range(3)} if depth == 1 else {(i, j) for i in range(3) for j in range(3)}
        if set(parts) != wanted:
            raise FormatError(f"The released weights hold {len(parts)} of the {len(wanted)} parts of {ours}.")
        whole = torch.stack([parts[key] for key in sorted(wanted)])
        state[ours] = whole if depth == 1 else whole.unflatten(0, (3, 3))
    return Imported(state, tuple(read), left)


def from_released_vit(released: Mapping[str, Tensor]) -> Imported:
    """Return the tensors of a timm ViT under the names of our image encoder."""
    state: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, value in released.items():
        if name == "pos_embed":
            left[name] = _COMPUTED
        elif name.startswith(_TIMM_KEPT):
            state["vit." + name.replace("patch_embed.proj.", "patch_embed.")] = value
        elif name.startswith("fc_norm."):
            state["vit." + name.removeprefix("fc_")] = value
        elif name.startswith("head."):
            left[name] = "a classification head; the tasks here bring their own"
        else:
            left[name] = "no part of an image encoder of ours has this name"
    return Imported(state, tuple(n for n in released if n not in left), left)


def _take(
    name: str,
    value: Tensor,
    released: Mapping[str, Tensor],
    state: dict[str, Tensor],
    stacks: dict[str, dict[tuple[int, ...], Tensor]],
) -> str:
    """Place one released tensor; return the reason where it is left, else an empty string."""
    if name in _LEFT:
        return _LEFT[name]
    for theirs, ours in _SAME.items():
        if name == theirs or name.startswith(theirs + "."):
            state[ours + name.removeprefix(theirs)] = value
            return ""
    if found := re.fullmatch(r"osm_encoder\.convs\.0\.convs\.<?(\w+?)___to___(\w+?)>?\.(.+)", name):
        source, target, part = NODE_TYPES.index(found[1]), NODE_TYPES.index(found[2]), found[3]
        if part == "lin_dst.weight":
            twin = released.get(name.replace("lin_dst", "lin_src"))
            if twin is None or not torch.equal(twin, value):
                raise FormatError(
                    f"{name} differs from lin_src.weight.", hint="Only convolutions with one projection can be read."
                )
            return "equal to lin_src.weight: the convolution has one projection"
        if part == "lin_edge.weight" or part == "att_edge":
            raise FormatError(f"{name} is of a model with relations in its convolutions, which was never released.")
        ours = {"att_src": "att_source", "att_dst": "att_target", "bias": "bias"}.get(part, "weight")
        flat = value.reshape(-1) if ours != "weight" else value
        stacks.setdefault(f"osm_encoder.layer.{ours}", {})[source, target] = flat
        return ""
    if found := re.fullmatch(r"(osm_norm|osm_aggr_mlp|osm_mask_token|osm_read_out)\.(point|line|polygon)\.?(.*)", name):
        kind = NODE_TYPES.index(found[2])
        ours = {
            "osm_norm": f"osm_encoder.norm.{found[3]}",
            "osm_aggr_mlp": f"readout.{found[3]}",
            "osm_mask_token": "pretraining.node_token",
            "osm_read_out": f"readout.read.{_LSTM.get(found[3].removeprefix('lstm.'), found[3])}",
        }[found[1]]
        stacks.setdefault(ours, {})[kind,] = value.reshape(-1) if found[1] == "osm_mask_token" else value
        return ""
    if found := re.fullmatch(r"osm_cross_modal_encoder\.0\.(\w+)\.(in_proj_|out_proj\.)(weight|bias)", name):
        ours = f"fusion.{_ATTENTION[found[1]]}"
        if found[2] == "out_proj.":
            state[f"{ours}.out.{found[3]}"] = value
        else:
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{ours}.{part}.{found[3]}"] = tensor
        return ""
    return "no part of the model has this name"
