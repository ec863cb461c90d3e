"""The report of a pretraining: curves, reconstructions, what hidden objects were taken for, retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rsosm_cli.graph.arrays import GraphArrays
from rsosm_cli.graph.schema import NODE_TYPES
from rsosm_cli.models.encodings import Objects, Patches
from rsosm_cli.models.geolink import patchify, unpatchify
from rsosm_cli.tiles.tags import TagInputs
from rsosm_cli.training.report import Report

if TYPE_CHECKING:
    from rsosm_cli.training.heldout import Example

# Tiles shown, and the hidden objects listed.
TILES = 6
_OBJECTS = 24
_NEAREST = 3  # tags named for a predicted object
_GREY = 0.5  # what hidden patches look like


# Title and unit of the curves of each part of the loss.
_CURVES = {
    "geolink": {
        "image": ("Reconstruction of hidden patches", "mean squared error of normalised pixels"),
        "contrastive": ("Contrast of image and graph", "InfoNCE, nats"),
        "node": ("Prediction of hidden objects", "mean squared error of text vectors"),
    },
    "rose": {
        "image": ("Reconstruction of hidden patches", "mean squared error of pixels"),
        "node": ("Prediction of hidden objects", "mean squared error of text, sizes and shape"),
    },
    "mmgr": {
        "views": ("Contrast of two views of an image", "NT-Xent, nats"),
        "points": ("Contrast of image and points of interest", "NT-Xent, nats"),
    },
}
_FACTS = {
    "method": "Method",
    "devices": "Devices",
    "stores": "Tile stores",
    "training_tiles": "Training tiles",
    "heldout_tiles": "Held-out tiles",
    "tags": "Different tags",
    "epochs": "Epochs",
    "batch": "Tiles a step",
    "steps": "Steps",
    "parameters": "Parameters",
    "pois": "Points of interest",
    "poi_categories": "Categories of points",
    "loss": "Loss",
    "heldout_loss": "Loss, held out",
    "retrieval_top1": "Retrieval, top 1",
    "chance": "Retrieval by guessing",
    "candidates": "Tiles to choose from",
}


@dataclass(frozen=True)
class Reconstruction:
    """What the report shows of an example; arrays on the host."""

    pictures: list[NDArray[np.uint8]]  # (H, 3 W + gaps, 3) visible patches, prediction, truth
    objects: list[tuple[str, str, str, float]]  # kind, its tags, nearest tags of the prediction, cosine to the truth


def show(
    example: Example, patch: int, mean: Tensor, std: Tensor, tags: Sequence[str], inputs: TagInputs
) -> Reconstruction:
    """Return what the model made of an example: nothing, of what its method does not predict."""
    patches, objects = example.losses.patches, example.losses.objects
    pictures = [] if patches is None else reconstruct(example.images, patches, patch, mean, std)
    rows: list[tuple[str, str, str, float]] = []
    if objects is not None:
        truth = torch.cat([example.graphs[name].x for name in NODE_TYPES])
        rows = guesses(objects, inputs.select(example.batch.graphs), truth, tags, inputs.vectors)
    return Reconstruction(pictures, rows)


def reconstruct(images: Tensor, found: Patches, patch: int, mean: Tensor, std: Tensor) -> list[NDArray[np.uint8]]:
    """Return a picture a tile: visible patches, prediction (visible patches kept), truth."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    truth = patchify(images, patch)  # (B, L, p * p * C)
    predicted = found.pixels.float()
    if found.normalised:
        predicted = predicted * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    visible = torch.zeros(truth.shape[:2], device=truth.device).scatter(1, found.keep, 1.0)[..., None] > 0
    grey = (_GREY - mean) / std
    hidden = grey.repeat(patch * patch).expand_as(truth)  # channels vary fastest
    panels = [torch.where(visible, truth, hidden), torch.where(visible, truth, predicted), truth]
    shown = [_rgb(unpatchify(p, patch, rows, columns), mean, std) for p in panels]
    gap = np.full((shown[0].shape[1], 4, 3), 255, dtype=np.uint8)
    return [np.concatenate([a, gap, b, gap, c], axis=1) for a, b, c in zip(*shown, strict=True)]


def _rgb(images: Tensor, mean: Tensor, std: Tensor) -> NDArray[np.uint8]:
    """Return (B, H, W, 3): the first three bands, or the first one thrice."""
    values = images.float() * std[:, None, None] + mean[:, None, None]
    values = values[:, :3] if values.shape[1] >= 3 else values[:, :1].expand(-1, 3, -1, -1)
    return (values.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def guesses(
    found: Objects, graphs: GraphArrays, features: Tensor, tags: Sequence[str], vectors: Tensor
) -> list[tuple[str, str, str, float]]:
    """Return, for hidden objects, what they are and the tags whose vectors are nearest to what was predicted.

    ``features`` (N, W) are the objects' true vectors, type after type.
    """
    index, predicted = found.index, found.vectors.float()
    if not len(index) or not len(tags):
        return []
    places = torch.linspace(0, len(index) - 1, min(_OBJECTS, len(index))).round().long().to(index.device)
    index, predicted = index[places], predicted[places]
    unit = functional.normalize(predicted, dim=1)
    cosine = (unit * functional.normalize(features[index].float(), dim=1)).sum(1).tolist()
    similarity = unit @ functional.normalize(vectors.float(), dim=1).T  # (M, V)
    nearest = similarity.topk(min(_NEAREST, len(tags)), dim=1).indices.tolist()
    starts = np.cumsum([0, *(len(graphs.nodes[t].osm_id) for t in NODE_TYPES)])
    rows: list[tuple[str, str, str, float]] = []
    for flat, near, similar in zip(index.tolist(), nearest, cosine, strict=True):
        kind = int(np.searchsorted(starts, flat, side="right")) - 1
        node, own = graphs.nodes[NODE_TYPES[kind]], flat - starts[kind]
        ids = node.tag_ids[node.tag_offsets[own] : node.tag_offsets[own + 1]]
        rows.append((NODE_TYPES[kind], _names(tags, ids.tolist()), _names(tags, near), similar))
    return rows


def _names(tags: Sequence[str], ids: Sequence[int], most: int = 4) -> str:
    return ", ".join(tags[i] for i in ids[:most]) + (", ..." if len(ids) > most else "")


def build_report(
    title: str,
    facts: Mapping[str, object],
    rows: Sequence[Mapping[str, Any]],
    shown: Reconstruction | None,
    *,
    method: str,
    held_out: bool,
    warnings: Sequence[str] = (),
) -> Report:
    """Return the page."""
    report = Report(title)
    for warning in warnings:
        report.warning(warning)
    report.facts({_FACTS[name]: value for name, value in facts.items() if name in _FACTS})
    report.heading("Losses")

    def series(name: str) -> list[tuple[float, float]]:
        return [(float(r["epoch"]), float(r[name])) for r in rows if name in r]

    curves = {"loss": ("Loss", "weighted sum of the parts below"), **_CURVES[method]}
    for name, (caption, unit) in curves.items():
        lines = {"training": series(name), "held out": series(f"heldout_{name}")}
        report.curves({k: v for k, v in lines.items() if v}, x="Epoch", y=unit, caption=caption)
    report.curves(
        {"learning rate": series("lr")}, x="Epoch", y="learning rate", caption="Learning rate at the end of the epoch"
    )
    report.curves({"tiles a second": series("samples_per_s")}, x="Epoch", y="tiles a second", caption="Speed")
    top1 = series("retrieval_top1")
    if top1:
        report.heading("Retrieval")
        last = next(r for r in reversed(rows) if "retrieval_top1" in r)
        report.text(
            f"{last['retrieval_top1']:.1%} of the held-out images find their own objects first, among "
            f"{last['candidates']:.0f} of tiles that share no ground; guessing finds {last['chance']:.1%}."
        )
        lines = {"image to objects, first hit": top1, "guessing": series("chance")}
        report.curves(lines, x="Epoch", y="share of tiles")
    if shown is not None:
        where = "Held-out tiles" if held_out else "Training tiles (none are held out)"
        if shown.pictures:
            report.heading("Reconstructions")
            report.text(f"{where}: what the encoder saw, what the decoder made of it, and the truth.")
        for picture in shown.pictures:
            report.image(picture)
        if shown.objects:
            report.heading("Hidden objects")
            report.text("Objects that were hidden, and the tags nearest to what the model predicted for them.")
            report.table(("kind", "its tags", "nearest tags of the prediction", "cosine to the truth"), shown.objects)
    return report
