"""Weights from files of others: plain tensors only, for the image encoder or as they are.

A file of torch is read with ``weights_only``: a pickle that would run anything is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rsosm_cli.errors import FormatError, NoFileError
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.released import Imported, from_released_vit
from rsosm_cli.models.vit import ImageEncoder

# Where training codes keep the tensors inside a file, and what wrappers put before their names.
_CONTAINERS = ("model_state_dict", "state_dict", "model", "model_ema")
_PREFIXES = ("", "module.", "model.", "encoder.", "img_encoder.", "backbone.", "module.model.", "encoder.vit.")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file by name, and the plain values that stand beside them (``model_config`` for one)."""
    if not path.is_file():
        raise NoFileError(f"There is no file {path}.", hint="Give a file of weights (.pth, .pt, .bin, .safetensors).")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path), {}
        except SafetensorError as error:
            raise FormatError(f"{path} is damaged: {error}.", hint="Get the file again.") from error
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch names what the pickle asks for; a file that is no pickle at all ends here, too.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise FormatError(f"{path} is no file of weights, or damaged.", hint="Get the file again.") from error
        culprit = asked[1].rstrip(".,")
        raise FormatError(
            f"{path} holds more than plain tensors ({culprit}), and loading it could run code.",
            hint="Ask its authors for a file of tensors alone, or for safetensors.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise FormatError(
            f"{path} is no file of weights, or damaged: {' '.join(str(error).split())[:160]}",
            hint="Get the file again.",
        ) from error
    beside: dict[str, Any] = {}
    if isinstance(data, Mapping):
        for container in _CONTAINERS:
            if isinstance(data.get(container), Mapping):
                beside = {k: v for k, v in data.items() if k != container and not isinstance(v, Tensor)}
                data = data[container]
                break
    if not isinstance(data, Mapping) or not data:
        raise FormatError(f"{path} holds no named tensors.", hint="Give a state dictionary.")
    other = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if other:
        raise FormatError(f"{path} holds more than plain tensors: {', '.join(other[:3])}.", hint="Give tensors alone.")
    return {str(name): value for name, value in data.items()}, beside


def load_image_weights(model: TileEncoder, path: Path) -> None:
    """Start a model's image encoder from a file of timm's, of a checkpoint of ours, or of a training code around one.

    Positions of ViTs are left: ours are computed. RGB weights are inflated to other numbers of bands (:func:`inflate`).
    Raises FormatError where the file is of another network.
    """
    if isinstance(model.image_encoder, ImageEncoder):
        load_vit_weights(model.image_encoder, path)
    else:
        _load_network(model, path)


def _load_network(model: TileEncoder, path: Path) -> None:
    """Start a convolutional network; the classifier of the file is left."""
    tensors, _ = read_tensors(path)
    network, name = model.image_encoder, model.settings.image_encoder
    own = network.state_dict()
    first = next(iter(own))
    prefixes = ("backbone.", "encoder.backbone.", *_PREFIXES)
    prefix = next((p for p in prefixes if p + first in tensors), None)
    if prefix is None:
        raise FormatError(f"{path} is not of {name} (no {first}).", hint="Give weights of timm's network of this name.")
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if state[first].ndim == 4 and state[first].shape[1] != model.settings.in_chans:
        state[first] = inflate(state[first], model.settings.in_chans)
    # Old files do not count their batches.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    wrong = [n for n in own if n in state and state[n].shape != own[n].shape]
    if missing or wrong:
        raise FormatError(
            f"{path} does not fit {name}: {'no ' + missing[0] if missing else wrong[0] + ' has another shape'}.",
            hint="Choose the image_encoder that the weights are of.",
        )
    network.load_state_dict({n: state.get(n, t) for n, t in own.items()})


def load_vit_weights(vit: ImageEncoder, path: Path) -> Imported:
    """Start a ViT as :func:`load_image_weights` does; return what was read and what was left."""
    tensors, _ = read_tensors(path)
    if "vit.patch_embed.weight" in tensors or "encoder.vit.patch_embed.weight" in tensors:
        prefix = "encoder." if "vit.patch_embed.weight" not in tensors else ""
        ours = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix + "vit.")}
        reason = "not of the image encoder"
        imported = Imported(ours, tuple(ours), {n: reason for n in tensors if n.removeprefix(prefix) not in ours})
    else:
        imported = from_released_vit(_unwrap(tensors, path))
    state = {name.removeprefix("vit."): tensor for name, tensor in imported.state.items()}
    kernel = state.get("patch_embed.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] != vit.in_chans:
        state["patch_embed.weight"] = inflate(kernel, vit.in_chans)
    missing = [name for name in vit.state_dict() if name not in state]
    wrong = [
        f"{name} {tuple(state[name].shape)} for {tuple(own.shape)}"
        for name, own in vit.state_dict().items()
        if name in state and state[name].shape != own.shape
    ]
    if missing or wrong or set(state) - set(vit.state_dict()):
        first = wrong[0] if wrong else f"no {missing[0]}" if missing else "more blocks"
        raise FormatError(
            f"{path} does not fit {vit.name}: {first}.", hint="Choose the image_encoder that the weights are of."
        )
    vit.load_state_dict(state)
    return imported


def inflate(kernel: Tensor, bands: int) -> Tensor:
    """Return a patch projection (D, ``bands``, p, p) from ``kernel`` (D, C, p, p) that answers alike to a grey image.

    More bands repeat the channels in turn, each divided by how often it stands there; fewer share the channels' sum.
    """
    given = kernel.shape[1]
    if bands < given:
        return (kernel.sum(1, keepdim=True) / bands).expand(-1, bands, -1, -1).contiguous()
    which = torch.arange(bands) % given
    return kernel[:, which] / which.bincount()[which].to(kernel.dtype)[:, None, None]


def _unwrap(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the tensors of the ViT without what a wrapper put before their names."""
    for prefix in _PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in tensors:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    raise FormatError(f"{path} holds no ViT (no patch_embed.proj.weight).", hint="Give weights of a timm ViT.")
