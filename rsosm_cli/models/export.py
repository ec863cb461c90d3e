"""An image encoder of ours as a folder that timm loads: safetensors, config and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from rsosm_cli import __version__
from rsosm_cli.errors import UsageError
from rsosm_cli.models.checkpoint import Description, Loaded
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.vit import ImageEncoder
from rsosm_cli.workspace import atomic, write_json, write_text

_PAPERS = {
    "geolink": "GeoLink: arXiv 2509.26016",
    "rose": "Rose: Remote Sensing of Environment 318, 114573, 2025",
    "mmgr": "MMGR: ISPRS Journal 201, 193-208, 2023",
}


def timm_state(vit: ImageEncoder, gsd_m: float | None = None) -> dict[str, Tensor]:
    """Return the tensors of ``vit`` under timm's names; the computed positions are written out for its own image
    size.
    """
    theirs = timm.create_model(vit.name, num_classes=0, in_chans=vit.in_chans, img_size=vit.image_size, depth=vit.depth)
    table = theirs.pos_embed
    if theirs.cls_token is None or not isinstance(table, Tensor):
        raise UsageError(
            f"timm's {vit.name} has no cls token or no position table, so it cannot hold this encoder.",
            hint="Use the checkpoint itself, or train one of timm's vit_*_patch16_224.",
        )
    side = vit.image_size // vit.patch
    position = vit.grid_position(side, side, gsd_m).detach().cpu()
    prefix = table.shape[1] - len(position)
    state = {"pos_embed": torch.cat((torch.zeros(prefix, vit.width), position))[None]}
    norm = "norm" if not isinstance(theirs.norm, nn.Identity) else "fc_norm"
    for name, tensor in vit.state_dict().items():
        first, _, rest = name.partition(".")
        new = {"patch_embed": "patch_embed.proj", "patch_norm": "patch_embed.norm", "norm": norm}.get(first, first)
        state[f"{new}.{rest}" if rest else new] = tensor.detach().cpu().contiguous()
    theirs.load_state_dict(state)  # what timm would refuse later, it refuses here
    return state


def write_timm(folder: Path, loaded: Loaded) -> list[Path]:
    """Write `model.safetensors`, `config.json` and `README.md`, for ``timm.create_model("local-dir:FOLDER")``."""
    encoder, description = loaded.encoder, loaded.description
    network, settings = encoder.image_encoder, encoder.settings
    args: dict[str, Any] = {"in_chans": settings.in_chans}
    if isinstance(network, ImageEncoder):
        state = timm_state(network, description.gsd)
        args |= {"img_size": settings.image_size, "depth": network.depth}
        names = {"classifier": "head", "first_conv": "patch_embed.proj"}
    else:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        known: dict[str, Any] = network.default_cfg  # type: ignore[assignment]
        names = {name: known[name] for name in ("classifier", "first_conv") if name in known}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "model.safetensors") as part:
        safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    config = {
        "architecture": settings.image_encoder,
        "num_classes": 0,
        "num_features": encoder.widths["image"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [settings.in_chans, settings.image_size, settings.image_size],
            "fixed_input_size": "img_size" in args,
            "mean": list(description.mean),
            "std": list(description.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            **names,
        },
    }
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", model_card(encoder, description))
    return [folder / name for name in ("model.safetensors", "config.json", "README.md")]


def model_card(encoder: TileEncoder, description: Description) -> str:
    """Return the model card: what it is, how inputs are made, the data and their licences, and how to load it."""
    facts = dict(description.provenance)
    sources = facts.pop("sources", [])
    settings, rows = encoder.settings, encoder.settings.image_size // encoder.stride
    vit = isinstance(encoder.image_encoder, ImageEncoder)
    method = description.method
    lines = [
        "---", "library_name: timm", "pipeline_tag: image-feature-extraction",
        "tags: [remote-sensing, openstreetmap, self-supervised]", "---", "",
        f"# {settings.image_encoder}, pretrained with {method}", "",
        f"The image encoder of a {method} model, written by rsosm {__version__}.", "",
        "| | |", "|---|---|",
        f"| Method | {method} ({_PAPERS[method]}) |",
        f"| Input | {settings.in_chans} bands (numbers {', '.join(map(str, description.bands))}), "
        f"{settings.image_size} x {settings.image_size} pixels, {description.gsd:g} m a pixel |",
        f"| Normalisation, of pixels 0..1 | mean {_numbers(description.mean)}; standard deviation "
        f"{_numbers(description.std)} |",
        f"| Output | {encoder.widths['image']} channels; pooled: the mean of the {'patches' if vit else 'map'} |",
    ]  # fmt: skip
    if isinstance(encoder.image_encoder, ImageEncoder):
        lines.append(f"| Blocks | {encoder.image_encoder.depth} |")
        lines.append(f"| Position | fixed sine-cosine table of {rows} x {rows} |")
    lines += ["", "## Data and licences", ""]
    lines += [f"- {s.get('name', '')}: {s.get('licence', '')}. {s.get('attribution', '')}" for s in sources]
    if not sources:
        lines.append("The checkpoint names no sources; ask who trained it before you publish what is derived from it.")
    if facts:
        lines += [
            "",
            "## Provenance",
            "",
            "```json",
            json.dumps(facts, indent=2, ensure_ascii=False, default=str),
            "```",
        ]
    shape = "(B, 1 + patches, width); the first is the cls token" if vit else "(B, width, h, w)"
    lines += [
        "", "## Use", "", "```python", "import timm",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
        f"features = model.forward_features(images)  # {shape}", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
