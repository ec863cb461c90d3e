"""What a fine-tuning is made from: tile stores, the encoder that it starts with, and what its checkpoint will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.settings import MmgrSettings, PretrainSettings, TaskSettings, resolve
from rsosm_cli.workspace import Workspace, file_stamp, fingerprint

if TYPE_CHECKING:
    from rsosm_cli.models.checkpoint import Description, TextDescription
    from rsosm_cli.tiles.folders import LabelFolder
    from rsosm_cli.tiles.labels import Extent
    from rsosm_cli.training.devices import Devices
    from rsosm_cli.training.labelled import Labelled

# Changes when the same settings and inputs would give another model.
VERSION = 2
MODALITIES = ("image", "osm", "fused")


@dataclass(frozen=True)
class Start:
    """Where the encoder comes from. ``weights``: None from scratch."""

    weights: Path | None
    description: Description | None  # None: to be made from the pretraining preset ``task.scratch``
    note: str
    identity: Any
    preset: PretrainSettings | None = None

    @property
    def method(self) -> str:
        if self.description is not None:
            return self.description.method
        assert self.preset is not None
        return self.preset.method

    def modalities(self, task: TaskSettings) -> list[str]:
        """Return what a head can see of a model of this method, image first."""
        from rsosm_cli.models.methods import METHODS

        kind = METHODS[self.method]
        there = kind.MAPS if task.dense else kind.MODALITIES
        return [m for m in MODALITIES if m in there and (m != "osm" or task.kind != "change")]

    def check(self, task: TaskSettings, *, compare: bool) -> None:
        """Raise UsageError where the method has nothing that the task's head, or one to compare it to, could see."""
        from rsosm_cli.models.encodings import check_modality
        from rsosm_cli.models.methods import METHODS

        there = self.modalities(task)
        if compare and (task.modality not in there or len(there) == 1):
            raise UsageError(
                f"{self.method} has only the modality {' and '.join(there)} for the {task.kind} {task.name}: that "
                f"cannot be compared to {task.modality if task.modality not in there else 'another'}.",
                hint=f"Leave out --compare and give --modality {there[0]}, or a checkpoint of another method.",
            )
        check_modality(METHODS[self.method], task)


@dataclass(frozen=True)
class Plan:
    space: Workspace
    stores: list[tuple[str, Path]]
    labels: list[Path]
    extent: Extent | None
    start: Start
    seeds: int
    label_share: float
    devices: Devices
    offline: bool
    force: bool
    name: str | None

    def key(self, task: TaskSettings) -> str:
        extent = self.extent
        return fingerprint(
            "finetune", VERSION, task.model_dump(mode="json", exclude={"workers"}),
            [file_stamp(path) for _, path in self.stores], [label_stamp(path) for path in self.labels],
            file_stamp(extent) if isinstance(extent, Path) else extent,
            file_stamp(Path(task.split.file)) if task.split.file else None,
            self.start.identity, self.seeds, self.label_share,
        )  # fmt: skip


def label_stamp(path: Path) -> Any:
    """Return what changes when labels do; of a folder, the names, sizes and times of its images."""
    if not path.is_dir():
        return file_stamp(path)
    from rsosm_cli.tiles.folders import read_folder

    items = read_folder(path).items
    return [[file_stamp(p) for p in (item.mask, *item.images) if p is not None] for item in items]


def input_size(start: Start, task: TaskSettings, folders: Sequence[LabelFolder]) -> tuple[int, float]:
    """Return the size and GSD at which images without a place are fed: those that the encoder knows."""
    if any(folder.layout == "chips" for folder in folders):
        from PIL import Image

        with Image.open(str(folders[0].items[0].mask)) as picture:
            return picture.size[0], start.description.gsd if start.description is not None else 1.0
    if start.description is not None:
        return start.description.tile, start.description.gsd
    settings = resolve(PretrainSettings, kind="pretrain", preset=task.scratch)
    return settings.model.image_size, 1.0


def tile_stores(space: Workspace, cities: Sequence[str], tiles: Sequence[Path]) -> list[tuple[str, Path]]:
    """Return (city, store) pairs: those named, or every one under the root."""
    found = [(city, space.tiles_of(city)) for city in cities]
    if tiles:
        from rsosm_cli.tiles.shards import find_stores

        found += [(_city_of(path), path) for path in find_stores(list(tiles))]
    if not found:
        found = [(c.name, c.tiles) for c in space.cities() if c.tiles.exists()]
    if not found:
        raise MissingError(f"There are no tiles under {space.root}.", hint="Run `rsosm build-graph --city NAME` first.")
    return found


def _city_of(path: Path) -> str:
    return path.parent.name if path.name == "tiles.h5" else path.stem


def starting_point(space: Workspace, task: TaskSettings, checkpoint: Path | None, offline: bool) -> Start:
    from rsosm_cli.models.checkpoint import find_checkpoint, read_description
    from rsosm_cli.training.runs import newest_run

    note = ""
    if checkpoint is None:
        try:
            run = newest_run(space.root, kind="pretrain")
        except MissingError as error:
            if task.protocol == "scratch":
                preset = resolve(PretrainSettings, kind="pretrain", preset=task.scratch)
                note = f"The model is that of the preset {task.scratch}, untrained."
                return Start(None, None, note, task.scratch, preset)
            raise MissingError(
                error.message, hint=f"{error.hint} Training without a pretrained encoder is --protocol scratch."
            ) from None
        checkpoint = run.folder
        note = f"The encoder is that of the run {run.name}, the newest pretraining under {space.root}."
    folder = find_checkpoint(checkpoint)
    description = read_description(folder)
    identity = [file_stamp(file) for file in sorted(folder.glob("model.*"))]
    if task.protocol == "scratch":
        return Start(None, description, f"The model has the architecture of {checkpoint}, untrained.", identity)
    return Start(folder, description, note or f"The encoder is that of {checkpoint}.", identity)


def describe(plan: Plan, task: TaskSettings, labelled: Labelled) -> tuple[Description, list[str]]:
    """Return what the checkpoint will say of itself (inputs, task, ground it was trained on), and notes."""
    from rsosm_cli.training.fit import fit_inputs

    shards = labelled.shards
    base = plan.start.description or _scratch_description(plan, task, labelled)
    if task.protocol == "scratch" and task.modality != "image" and shards.vector_width not in (0, base.text.width):
        # Untrained, the architecture fits any vectors.
        base = base.model_copy(update={"text": _text_of_vectors(shards.vector_width)})
    size, gsd_m, notes = fit_inputs(shards, base, task)
    provenance = {
        **base.provenance,
        "encoder": None if plan.start.weights is None else str(plan.start.weights),
        "labels": [path.name for path in plan.labels],
        "stores": shards.provenance,
        "split": {"seed": task.seed, "block_m": labelled.split.block_m, "ground": list(labelled.split.ground)},
    }
    description = base.model_copy(
        update={
            "task": task, "tile": size, "gsd": gsd_m, "bands": shards.bands[: len(shards.bands) // task.images],
            "graph": shards.graph_settings, "provenance": provenance, "metrics": {},
        }
    )  # fmt: skip
    return description, notes


def _text_of_vectors(width: int) -> TextDescription:
    from rsosm_cli.models.checkpoint import TextDescription

    return TextDescription(encoder="vectors", width=width)


def _scratch_description(plan: Plan, task: TaskSettings, labelled: Labelled) -> Description:
    from rsosm_cli.models.checkpoint import Description, TextDescription
    from rsosm_cli.text.encoder import load_text_encoder
    from rsosm_cli.text.weights import read_key_counts
    from rsosm_cli.tiles.shards import key_counts

    settings = plan.start.preset
    assert settings is not None
    if isinstance(settings.model, MmgrSettings) and settings.model.points == "cooccurrence":
        raise UsageError(
            f"The preset {task.scratch} learns its categories in pretraining, so it cannot start from scratch.",
            hint="Set scratch to a preset of another method, or pretrain it.",
        )
    table = settings.text.tag_counts
    shards = labelled.shards
    if shards.vector_width:
        text = _text_of_vectors(shards.vector_width)
    else:
        encoder = load_text_encoder(settings.text.encoder, offline=plan.offline)
        text = TextDescription(encoder=settings.text.encoder, width=encoder.width, identity=encoder.identity)
    train = labelled.tiles[labelled.split.of("train")]
    bands = len(shards.bands) // task.images
    if bands == 3:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in pretraining
    else:
        pixels = shards.images(train[:256]).astype(np.float32)[:, :bands] / 255
        mean = tuple(pixels.mean(axis=(0, 2, 3)).tolist())
        std = tuple(pixels.std(axis=(0, 2, 3)).clip(1e-3).tolist())
    return Description(
        method=settings.method,
        model=settings.model.model_copy(update={"in_chans": bands, "image_size": shards.tile_px}), text=text,
        tag_weight=settings.text.tag_weight,
        key_counts=read_key_counts(Path(table)) if table else key_counts(shards, train), graph=shards.graph_settings,
        tile=shards.tile_px, gsd=shards.gsd_m, bands=shards.bands[:bands], mean=mean, std=std,
    )  # fmt: skip
