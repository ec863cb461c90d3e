"""``convert``: released weights into a checkpoint of ours, and an image encoder of ours into a folder for timm."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsosm_cli.errors import FormatError, MissingError, RsosmError, UsageError
from rsosm_cli.models.checkpoint import Description, find_checkpoint, load_checkpoint, save_checkpoint
from rsosm_cli.models.export import write_timm
from rsosm_cli.models.geolink import GeoLink
from rsosm_cli.models.released import Imported, from_released, from_released_vit, is_multimodal
from rsosm_cli.models.weights import read_tensors
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress
from rsosm_cli.settings import GraphSettings, ModelSettings
from rsosm_cli.workspace import Manifest, file_stamp, fingerprint

VERSION = 1  # of what is written
# What the released files do not say of themselves; the publication and the released code do.
_HEADS = {"decoder_heads": 16, "fusion_heads": 16}
_CLIP_WIDTH = 512
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_GSD_M = 0.6  # SkyScript has 0.1 to 30 m a pixel; this is the default grid's
_SOURCES = [
    {"name": "SkyScript", "licence": "see its publication", "attribution": "SkyScript (AAAI 2024)"},
    {
        "name": "OpenStreetMap",
        "licence": "ODbL 1.0",
        "attribution": "OpenStreetMap contributors",
    },
]


def convert(
    file: Path,
    *,
    output: Path | None = None,
    root: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> Result:
    """Convert ``file`` into the folder ``output``.

    A run, a checkpoint or its file becomes a folder with its image encoder for timm (default: ``image-encoder`` beside
    it); any other file of weights, a released GeoLink model or a timm ViT, becomes a checkpoint (default: named like
    the file). ``root`` is not used. Raises FormatError for a file that holds anything but plain tensors, or of another
    model.
    """
    started = time.monotonic()
    try:
        ours: Path | None = find_checkpoint(file)
    except RsosmError:
        # Weights of others have no description beside them.
        if not file.is_file():
            raise
        ours = None
    source = ours / "model.safetensors" if ours is not None else file
    folder = output or ((ours / "image-encoder") if ours is not None else file.with_suffix(""))
    if folder.is_file() or folder == file:
        raise UsageError(f"{folder} is a file, and the result is a folder.", hint="Choose another --output.")
    if not source.is_file():
        raise MissingError(f"{source} is not there.", hint="Copy the whole checkpoint.")
    paths = {"folder": str(folder)}
    kind = "timm" if ours is not None else "checkpoint"
    if dry_run:
        size = {"bytes": source.stat().st_size}
        return Result("convert", file.name, "planned", paths=paths, numbers=size, notes=(f"Writes a {kind} folder.",))
    key = fingerprint(file_stamp(source), kind, VERSION)
    manifest = Manifest(folder / "manifest.json")
    if not force and manifest.finished("convert", key):
        return Result("convert", file.name, "skipped", paths=paths)
    if not force and folder.exists() and any(folder.iterdir()) and not manifest.step("convert"):
        raise UsageError(f"The folder {folder} is not empty.", hint="Choose another --output, or say --force.")
    numbers: dict[str, Any] = {}
    notes: tuple[str, ...] = ("Load it with: timm.create_model('local-dir:FOLDER', pretrained=True)",)
    with progress.task("convert", None):
        if ours is not None:
            files = write_timm(folder, load_checkpoint(ours))
        else:
            files, numbers, notes = _import(file, folder)
    seconds = time.monotonic() - started
    manifest.record("convert", key, files=files, seconds=seconds, source=file.name)
    return Result("convert", file.name, "done", paths=paths, numbers=numbers, notes=notes, seconds=seconds)


def _import(file: Path, folder: Path) -> tuple[list[Path], dict[str, Any], tuple[str, ...]]:
    """Write a checkpoint from the weights of others; return its files, counts, and what was read and left."""
    tensors, beside = read_tensors(file)
    config = beside.get("model_config") or {}
    if is_multimodal(tensors):
        imported = from_released(tensors)
        settings, text_width = describe_released(tensors, config)
        notes = ["The file has no counts of tag keys: all tags of an object weigh alike."]
        untrained: list[str] = []
    elif "patch_embed.proj.weight" in tensors:
        imported = from_released_vit(tensors)
        settings, text_width = _describe_vit(tensors, config), _CLIP_WIDTH
        notes = ["The file holds the image encoder alone: the OSM encoder and the fusion are untrained."]
        untrained = ["osm_encoder", "readout", "patches_in", "objects_in", "fusion", "pretraining"]
    else:
        raise FormatError(
            f"{file} holds neither a GeoLink model nor a ViT (no patch_embed.proj.weight).",
            hint="Give a released GeoLink file or weights of a timm ViT.",
        )
    torch.manual_seed(0)  # untrained parts are the same each time
    model = GeoLink(settings, text_width)
    _load(model, imported, untrained, file)
    description = Description(
        model=settings,
        text={"encoder": "clip", "width": text_width},
        tag_weight="log",
        graph=GraphSettings(compat="released"),
        tile=settings.image_size,
        gsd=_GSD_M,
        mean=_MEAN,
        std=_STD,
        provenance={
            "converted_from": file.name,
            "sha256": _sha256(file),
            "untrained": untrained,
            "sources": _SOURCES if not untrained or "architecture" in config else [],
            "model_config": {k: v for k, v in config.items() if isinstance(v, str | int | float | bool)},
        },
    )
    notes.append(f"The file names no ground sample distance: {_GSD_M} m a pixel is taken.")
    reasons: dict[str, list[str]] = {}
    for name, reason in imported.left.items():
        reasons.setdefault(reason, []).append(name)
    notes += [f"Left {_few(names)}: {reason}." for reason, names in reasons.items()]
    numbers = {"tensors_read": len(imported.read), "tensors_left": len(imported.left)}
    return save_checkpoint(folder, model, description), numbers, tuple(notes)


def describe_released(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[ModelSettings, int]:
    """Return the settings that a released whole model has, read from its shapes, and its text width."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        n_decoder = len({n.split(".")[1] for n in shape if n.startswith("img_cross_modal_decoder.")})
        settings = ModelSettings(
            image_encoder=_architecture(shape["img_encoder.patch_embed.proj.weight"], config),
            image_size=_image_size(shape["img_pos_embed"], shape["img_encoder.patch_embed.proj.weight"]),
            in_chans=shape["img_encoder.patch_embed.proj.weight"][1],
            osm_width=shape["osm_norm.point.weight"][0],
            fusion_width=shape["img_fusion_mlp.weight"][0],
            decoder_width=shape["img_decoder_mlp.weight"][0],
            decoder_depth=n_decoder,
            projection_width=shape["img_consistency_prj.weight"][0],
            compat="released",
            **_HEADS,
        )
        return settings, shape["osm_node_pred.weight"][0]
    except KeyError as error:
        raise FormatError(
            f"The released weights have no {error.args[0]}.", hint="The file is of another model."
        ) from error


def _describe_vit(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelSettings:
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    patches = shape["patch_embed.proj.weight"]
    size = _image_size(shape["pos_embed"], patches) if "pos_embed" in shape else 224
    return ModelSettings(
        image_encoder=_architecture(patches, config), image_size=size, in_chans=patches[1], compat="released"
    )


def _architecture(patches: tuple[int, ...], config: Mapping[str, Any]) -> str:
    """Return the timm name that the file gives, else the common one of this width."""
    if isinstance(name := config.get("architecture"), str):
        return name
    names = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
    if patches[0] not in names:
        raise FormatError(
            f"The file does not say which ViT it is of ({patches[0]} channels).",
            hint="Give a file with model_config.architecture.",
        )
    return f"vit_{names[patches[0]]}_patch{patches[-1]}_224"


def _image_size(position: tuple[int, ...], patches: tuple[int, ...]) -> int:
    return int((position[1] - 1) ** 0.5) * patches[-1]


def _load(model: GeoLink, imported: Imported, untrained: list[str], file: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(imported.state, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{file} does not fit its own description: {reason}", hint="Get the file again.") from error
    missing = [name for name in missing if name.split(".")[0] not in untrained]
    if missing or unexpected:
        raise FormatError(
            f"{file} is not a whole model: {_few([*missing, *unexpected])} "
            f"{'is missing' if missing else 'has no place'}.",
            hint="Get the file again, or use the image encoder alone.",
        )  # fmt: skip


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
