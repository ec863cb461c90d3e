"""Checkpoints: ``model.safetensors`` and, beside it, ``model.json`` that says everything needed to use the weights.

Nothing is unpickled. A description of another format, method or version is refused with a sentence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import Field, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rsosm_cli.errors import FormatError, MissingError, NoFileError
from rsosm_cli.models.encodings import TileEncoder
from rsosm_cli.models.heads import TaskModel
from rsosm_cli.models.methods import METHODS, build_encoder
from rsosm_cli.settings import AnyModel, GraphSettings, Method, Settings, TaskSettings, model_of_method
from rsosm_cli.workspace import atomic, write_json

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


class TextDescription(Settings):
    """The text model whose vectors the objects carry."""

    encoder: str = Field(
        description="Name or folder of the text model; `categories`: embeddings of categories among the weights; "
        "`vectors`: those that imported graphs bring."
    )
    width: int = Field(gt=0, description="Width of a vector.")
    identity: dict[str, str] = Field({}, description="Name and revision or digest of the weights.")


class Description(Settings):
    """What a checkpoint says of itself: how inputs must be made, and where the weights come from."""

    format: int = Field(FORMAT, description="Version of this description.")
    method: Method = Field("geolink", description="Method of the model.")
    model: AnyModel = Field(description="Settings of the model.")
    text: TextDescription = Field(description="Text model of the tags.")
    tag_weight: str = Field("count", description="Rule from key counts to tag weights.")
    key_counts: dict[str, int] = Field({}, description="Occurrences of every key in the pretraining corpus.")
    categories: tuple[str, ...] = Field((), description="Rows of the table of category embeddings; none: no table.")
    graph: GraphSettings = Field(GraphSettings(), description="How graphs were built, tag rules among it.")
    tile: int = Field(gt=0, description="Side of a tile, in pixels.")
    gsd: float = Field(gt=0, description="Metres on the ground a pixel.")
    bands: tuple[int, ...] = Field((1, 2, 3), description="Bands of the imagery, counted from 1.")
    mean: tuple[float, ...] = Field(description="Mean of each band, of pixels 0..1.")
    std: tuple[float, ...] = Field(description="Standard deviation of each band, of pixels 0..1.")
    task: TaskSettings | None = Field(None, description="The task of the head; none: an encoder alone.")
    temperature: float = Field(
        1.0, gt=0, description="What logits are divided by, so that probabilities are as often right as they say."
    )
    provenance: dict[str, Any] = Field({}, description="Sources, licences, runs and dates that the weights come from.")
    metrics: dict[str, Any] = Field({}, description="Metrics of the run.")

    _model_of_method = field_validator("model", mode="before")(model_of_method)


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its description, and the folder it was read from."""

    model: TileEncoder | TaskModel
    description: Description
    folder: Path

    @property
    def encoder(self) -> TileEncoder:
        return self.model.encoder if isinstance(self.model, TaskModel) else self.model


def save_checkpoint(folder: Path, model: nn.Module, description: Description) -> list[Path]:
    """Write weights and description into ``folder``, each whole or not at all; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / WEIGHTS) as part:
        # One key alone: safetensors writes several in an order that differs from process to process.
        safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))
    return [folder / WEIGHTS, folder / DESCRIPTION]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that ``path`` means: a run's folder (its best, else its last), a checkpoint or its
    file.
    """
    if path.name in (WEIGHTS, DESCRIPTION) or path.suffix == ".safetensors":
        path = path.parent if path.is_file() else path
    tried = [path, path / "checkpoints" / "best", path / "checkpoints" / "last"]
    for folder in tried:
        if (folder / DESCRIPTION).is_file():
            return folder
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin") and path.is_file():
        raise FormatError(f"{path} is not a checkpoint of rsosm.", hint=f"Read it with: rsosm convert {path}")
    if not path.exists():
        raise NoFileError(f"There is no checkpoint {path}.", hint="Give a run's folder or a checkpoint's.")
    raise MissingError(
        f"{path} holds no checkpoint ({DESCRIPTION} is not there).", hint="Give a run's folder or a checkpoint's."
    )


def read_description(path: Path) -> Description:
    """Return the description of the checkpoint that ``path`` means; FormatError where it cannot be read here."""
    file = find_checkpoint(path) / DESCRIPTION
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} is damaged: {error}.", hint="Train or convert the checkpoint again.") from error
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise FormatError(
            f"{file} has format {version!r}, and this rsosm reads {FORMAT}.", hint="Use the rsosm that wrote it."
        )
    if data.get("method") not in METHODS:
        raise FormatError(
            f"{file} is of method {data.get('method')!r}, and this rsosm knows {', '.join(METHODS)}.",
            hint="Use the rsosm that wrote it.",
        )
    try:
        return Description.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{file} cannot be read: {key}: {first['msg']}.", hint="Use the rsosm that wrote it."
        ) from error


class _Undrawn(TorchFunctionMode):
    """Leaves new weights as they come from memory, where those of a file are put into them: drawing those of a
    ViT-L takes 20 seconds.
    """

    # Of torch, as its layers call them, and of tensors, as timm draws.
    _DRAWS = frozenset(
        [f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")]
        + [Tensor.uniform_, Tensor.normal_, Tensor.erfinv_]
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_checkpoint(path: Path) -> Loaded:
    """Load the checkpoint that ``path`` means (see :func:`find_checkpoint`), on the CPU, in evaluation mode."""
    folder = find_checkpoint(path)
    description = read_description(folder)
    with _Undrawn():
        encoder = build_encoder(description.model, description.text.width, len(description.categories))
        model: TileEncoder | TaskModel = encoder if description.task is None else TaskModel(encoder, description.task)
    file = folder / WEIGHTS
    if not file.is_file():
        raise MissingError(f"{file} is not there, though its description is.", hint="Copy the whole folder.")
    try:
        state = safetensors.torch.load_file(file)
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"{file} is damaged or of another model: {reason}", hint="Copy or train it again.") from error
    return Loaded(model.eval(), description, folder)
