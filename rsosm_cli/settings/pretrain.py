"""Settings of `pretrain`: the text encoder, the model, the optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from rsosm_cli.settings.base import Settings
from rsosm_cli.settings.models import MODELS, AnyModel, Method, model_of_method


class TextSettings(Settings):
    encoder: str = Field("minilm", description="`minilm`, `clip`, or a folder with a transformers text model.")
    tag_weight: Literal["count", "log"] = Field(
        "count", description="Weight of a tag: occurrences of its key, or their ln."
    )
    tag_counts: str = Field(
        "", description="Table of the keys' occurrences (`key count`, one a line) in place of the training tiles' own."
    )


class OptimSettings(Settings):
    optimizer: Literal["adamw", "adam"] = Field(
        "adamw", description="Optimiser; `adam` adds the weight decay to the gradients."
    )
    lr: float = Field(1e-4, gt=0, description="Base learning rate, at batch size 256 (scaled linearly).")
    weight_decay: float = Field(0.05, ge=0, description="Weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Decay of the optimiser's two moments.")
    epochs: int = Field(60, gt=0, description="Passes over the data.")
    warmup_epochs: float = Field(5.0, ge=0, description="Linear warm-up, in epochs.")
    schedule: Literal["cosine", "step"] = Field(
        "cosine",
        description="After the warm-up: cosine to zero, or a tenth of the rate from each of the milestones on.",
    )
    milestones: tuple[float, ...] = Field((), description="Epochs after which the rate falls (`schedule: step`).")
    batch_size: int = Field(256, gt=0, description="Samples a step, over all devices.")
    accumulate: int = Field(1, gt=0, description="Steps whose gradients are added before an update.")
    clip_norm: float | None = Field(None, gt=0, description="Largest gradient norm; none: no clipping.")

    @model_validator(mode="after")
    def _falls(self) -> OptimSettings:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("a schedule of steps needs milestones")
        return self


class AugmentSettings(Settings):
    crop_scale: tuple[float, float] = Field(
        (0.2, 1.0), description="Share of the tile's area that a random crop keeps."
    )
    flip: float = Field(0.5, ge=0, le=1, description="Chance of a horizontal flip.")
    turns: bool = Field(False, description="Quarter turns, all four alike: seen from above, north is not up.")
    colour: float = Field(0.4, ge=0, description="Strength of brightness, contrast and saturation jitter.")


# Published where it is not GeoLink's: what a method starts from where neither preset nor user says otherwise.
_OPTIM: dict[str, dict[str, Any]] = {
    "geolink": {},
    "rose": {"lr": 1.5e-4, "batch_size": 64},
    # The rate that is published, 0.01 at a batch of 128, as a rate at 256; Adam as torch has it.
    "mmgr": {
        "optimizer": "adam", "lr": 2e-2, "batch_size": 128, "weight_decay": 0.0, "betas": (0.9, 0.999),
    },
}  # fmt: skip
_STEPS = {"epochs": 120, "warmup_epochs": 0.0, "schedule": "step", "milestones": (90.0, 110.0)}


class PretrainSettings(Settings):
    """Settings of `pretrain`."""

    method: Method = Field("geolink", description="Pretraining method.")
    model: AnyModel = Field(default_factory=lambda given: MODELS[given["method"]]())
    text: TextSettings = TextSettings()
    optim: OptimSettings = Field(default_factory=lambda given: _optim_of(given["method"], {}))
    augment: AugmentSettings = AugmentSettings()
    image_weights: str = Field(
        "", description="File of weights of the timm ViT to start the image encoder from; none: drawn anew."
    )
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")
    checkpoint_blocks: bool = Field(
        False, description="Compute the ViT's blocks again in the backward pass: less memory, about a third more time."
    )
    compile: bool = Field(
        False, description="Compile the ViT with `torch.compile`: minutes at the start, faster steps on a GPU."
    )
    workers: int = Field(2, ge=0, description="Processes that load data, a device.")
    holdout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the tiles held out for the retrieval check, as whole blocks of ground.",
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="Minutes between checkpoints within an epoch.")
    seed: int = Field(0, description="Seed of every draw.")

    _model_of_method = field_validator("model", mode="before")(model_of_method)

    @field_validator("optim", mode="before")
    @classmethod
    def _fill_optim(cls, value: Any, info: ValidationInfo) -> Any:
        return _optim_of(info.data.get("method", "geolink"), value) if isinstance(value, Mapping) else value


def _optim_of(method: str, values: Mapping[str, Any]) -> OptimSettings:
    published = _OPTIM[method] if method == "geolink" else {**_OPTIM[method], **_STEPS}
    return OptimSettings.model_validate({**published, **values})
