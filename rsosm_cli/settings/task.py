"""Settings of `finetune` and `map`: a task, its split, its map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from rsosm_cli.settings.base import Settings
from rsosm_cli.settings.pretrain import OptimSettings


class ClassSettings(Settings):
    name: str = Field(description="Name of the class.")
    colour: str = Field(pattern=r"^#[0-9a-fA-F]{6}$", description="Colour in maps, `#rrggbb`.")
    value: int | str | None = Field(
        None, description="Value of the class in labels; default: its place in the list, from 0, or its name."
    )


class SplitSettings(Settings):
    """Which ground trains, which chooses the epoch, which tests: never the same, and never tiles that overlap."""

    by: Literal["blocks", "city", "file"] = Field(
        "blocks",
        description="`blocks` of ground drawn by the seed; whole cities (`test_cities`); `file`: polygons with an "
        "attribute `split` (train, validation, test).",
    )
    test_cities: tuple[str, ...] = Field((), description="Cities whose labels only test (`by: city`).")
    file: str | None = Field(None, description="Vector file with an attribute `split` (`by: file`).")
    train: float = Field(0.5, gt=0, lt=1, description="Share of the blocks for training.")
    validation: float = Field(0.1, ge=0, lt=1, description="Share of the blocks for choosing the epoch.")
    block_m: float = Field(
        500.0, gt=0, description="Side of the square blocks of ground that go whole to one part, in metres."
    )
    buffer_m: float = Field(
        0.0, ge=0, description="Strip along the borders of the blocks that is used by none, in metres."
    )

    @model_validator(mode="after")
    def _parts(self) -> SplitSettings:
        if self.train + self.validation >= 1:
            raise ValueError("the shares of training and validation leave nothing to test on")
        if self.by == "city" and not self.test_cities:
            raise ValueError("a split by city needs test_cities")
        if self.by == "file" and self.file is None:
            raise ValueError("a split by file needs file")
        return self


class TaskSettings(Settings):
    """A task: what is predicted, from which labels, with which head."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="Short name; maps are `maps/<name>.tif`.")
    title: str = Field("", description="Title in legends and reports.")
    kind: Literal["segmentation", "classification", "regression", "distribution", "change"] = Field(
        "segmentation",
        description="What is predicted: a class a pixel; a class a tile; a value a tile; the shares of the classes in "
        "a tile; a class a pixel of two images of different dates.",
    )
    classes: tuple[ClassSettings, ...] = Field(
        (), description="Classes in order (all kinds but regression); a folder of classes as labels brings its own."
    )
    attribute: str = Field(
        "class",
        description="Attribute of vector labels that holds the class or the value. A distribution's labels may have a "
        "column of shares a class instead.",
    )
    background: str | None = Field(
        None, description="Class of labelled ground that no polygon covers; none: it is ignored."
    )
    ignore: tuple[int, ...] = Field((255,), description="Raster label values that mean `no label`.")
    point_radius_m: float = Field(
        0.0, ge=0, description="Radius of ground that a point label speaks for, in metres; 0: its pixel."
    )
    aggregate: Literal["mean", "sum"] = Field(
        "mean",
        description="How label values combine over a tile (regression): `mean` of a rate or density by area; `sum`: "
        "totals, shared by area; the prediction is the total of a tile.",
    )
    unit: str = Field("", description="Unit of the predicted value (regression).")
    log_target: bool = Field(False, description="Fit ln(1 + value) (regression).")
    loss: Literal["cross_entropy", "focal", "dice_cross_entropy", "mse", "l1", "kl"] = Field(
        "cross_entropy", description="Loss; a distribution has `kl`, the divergence from the labels' shares."
    )
    class_weights: Literal["none", "balanced"] = Field("none", description="Weights of the classes in the loss.")
    decoder: Literal["upernet", "linear", "mlp"] = Field("upernet", description="Head.")
    decoder_width: int = Field(512, gt=0, description="Channels of the `upernet` head; hidden width of the `mlp` head.")
    modality: Literal["image", "osm", "fused"] = Field("fused", description="What the head sees.")
    protocol: Literal["finetune", "frozen", "linear", "knn", "scratch"] = Field(
        "finetune", description="What is trained."
    )
    neighbours: int = Field(20, gt=0, description="Neighbours of the knn protocol.")
    scratch: str = Field(
        "geolink-tiny", description="Pretraining preset whose model `protocol: scratch` trains where there is no run."
    )
    encoder_lr: float = Field(0.01, ge=0, description="Learning rate of the encoder, as a multiple of the head's.")
    optim: OptimSettings = Field(
        OptimSettings(lr=1e-4, betas=(0.9, 0.999), epochs=30, warmup_epochs=1, batch_size=32),
        description="Optimisation; the learning rate is the head's, as it stands, whatever the batch.",
    )
    split: SplitSettings = SplitSettings()
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")
    workers: int = Field(2, ge=0, description="Processes that load data.")
    seed: int = Field(0, description="Seed of every draw.")

    @property
    def dense(self) -> bool:
        """Whether every pixel has an answer; else a tile has one."""
        return self.kind in ("segmentation", "change")

    @property
    def categorical(self) -> bool:
        """Whether the answer is one class."""
        return self.kind in ("segmentation", "classification", "change")

    @property
    def images(self) -> int:
        """Images of one place that the model looks at."""
        return 2 if self.kind == "change" else 1

    @model_validator(mode="before")
    @classmethod
    def _usual_loss(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("kind") == "distribution":
            return {"loss": "kl", **values}
        return values

    @model_validator(mode="after")
    def _classes(self) -> TaskSettings:
        names = [c.name for c in self.classes]
        if self.kind not in ("regression", "classification") and len(names) < 2:
            raise ValueError(f"a {self.kind} task needs at least two classes")
        if self.kind == "classification" and len(names) == 1:
            raise ValueError("a classification task needs at least two classes, or none where the labels bring them")
        if self.kind == "regression" and names:
            raise ValueError("a regression task has no classes")
        if (self.loss == "kl") != (self.kind == "distribution"):
            raise ValueError(f"a {self.kind} task cannot have the loss {self.loss}")
        if self.kind == "change" and self.modality == "osm":
            raise ValueError("a change task compares images: its modality is image or fused")
        if len(set(names)) < len(names):
            raise ValueError("class names must differ")
        if self.background is not None and self.background not in names:
            raise ValueError(f"background {self.background!r} is not one of the classes {', '.join(names)}")
        return self


class MapSettings(Settings):
    """Settings of `map`."""

    overlap: float = Field(0.5, ge=0, lt=0.9, description="Share of a window that the next one covers again.")
    batch_size: int = Field(8, gt=0, description="Windows at a time.")
    min_area_m2: float = Field(0.0, ge=0, description="Polygons below this area are left out.")
    simplify_px: float = Field(
        1.0, ge=0, description="Tolerance of the polygons' outlines, in pixels; 0: the pixels' edges."
    )
    probability: bool = Field(False, description="Write the probability of each class, too.")
    uncertainty: bool = Field(False, description="Write the entropy of the class probabilities (0 to 1), too.")
    refine: Literal["none", "sam"] = Field(
        "none", description="`sam` sharpens boundaries with a promptable segmenter, prompted by the coarse map."
    )
    refine_weights: str = Field(
        "facebook/sam-vit-base", description="Folder or hub repository of a transformers SamModel (`refine: sam`)."
    )
    tta: bool = Field(False, description="Average over the eight turns and mirrorings of every window.")
    precision: Literal["32", "bf16"] = Field("32", description="Arithmetic of the forward pass.")
