"""An image encoder of ours as a folder that timm loads: safetensors, config and a model card."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from rsosm_cli import __version__
from rsosm_cli.errors import UsageError
from rsosm_cli.models.checkpoint import Description, Loaded
from rsosm_cli.models.vit import ImageEncoder
from rsosm_cli.workspace import atomic, write_json, write_text


def timm_state(vit: ImageEncoder, gsd_m: float | None = None) -> dict[str, Tensor]:
    """Return the tensors of ``vit`` under timm's names; the computed positions are written out for its own image
    size.
    """
    theirs = timm.create_model(vit.name, num_classes=0, in_chans=vit.in_chans, img_size=vit.image_size)
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
    vit, description = loaded.encoder.vit, loaded.description
    state = timm_state(vit, description.gsd)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "model.safetensors") as part:
        safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    config = {
        "architecture": vit.name,
        "num_classes": 0,
        "num_features": vit.width,
        "model_args": {"in_chans": vit.in_chans, "img_size": vit.image_size},
        "pretrained_cfg": {
            "input_size": [vit.in_chans, vit.image_size, vit.image_size],
            "fixed_input_size": True,
            "mean": list(description.mean),
            "std": list(description.std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
    write_json(folder / "config.json", config)
    write_text(folder / "README.md", model_card(vit, description))
    return [folder / name for name in ("model.safetensors", "config.json", "README.md")]


def model_card(vit: ImageEncoder, description: Description) -> str:
    """Return the model card: what it is, how inputs are made, the data and their licences, and how to load it."""
    facts = dict(description.provenance)
    sources = facts.pop("sources", [])
    lines = [
        "---", "library_name: timm", "pipeline_tag: image-feature-extraction",
        "tags: [remote-sensing, openstreetmap, self-supervised]", "---", "",
        f"# {vit.name}, pretrained with {description.method}", "",
        f"The image encoder of a {description.method} model, written by rsosm {__version__}.", "",
        "| | |", "|---|---|",
        f"| Method | {description.method} (GeoLink: arXiv 2509.26016) |",
        f"| Input | {vit.in_chans} bands (numbers {', '.join(map(str, description.bands))}), "
        f"{vit.image_size} x {vit.image_size} pixels, {description.gsd:g} m a pixel |",
        f"| Normalisation, of pixels 0..1 | mean {_numbers(description.mean)}; standard deviation "
        f"{_numbers(description.std)} |",
        f"| Output | {vit.width} channels; pooled: the mean of the patches |",
        f"| Position | fixed sine-cosine table of {vit.image_size // vit.patch} x {vit.image_size // vit.patch} |",
        "", "## Data and licences", "",
    ]  # fmt: skip
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
    lines += [
        "", "## Use", "", "```python", "import timm",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
        "features = model.forward_features(images)  # (B, 1 + patches, width); the first is the cls token", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
