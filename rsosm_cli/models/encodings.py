"""What every method's model has in common: its encodings, the losses of a step, and what a head asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from rsosm_cli.errors import UsageError
from rsosm_cli.settings import AnyModel, TaskSettings


@dataclass(frozen=True)
class Encodings:
    """Encodings of ``B`` tiles; what was not asked for, or cannot be had, is None."""

    image: Tensor | None = None  # (B, D) mean of the patches, or the cls token
    cls: Tensor | None = None  # (B, D)
    osm: Tensor | None = None  # (B, W)
    fused: Tensor | None = None  # (B, F) mean of the hybrid patches, or their cls token
    image_map: Tensor | None = None  # (B, D, h, w)
    fused_map: Tensor | None = None  # (B, F, h, w)
    levels: tuple[Tensor, ...] = ()  # maps (B, ., h, w) of the levels asked for, before any norm


@dataclass(frozen=True)
class Patches:
    """Predicted patches: ``pixels`` (B, L, p * p * C), of which ``keep`` (B, K) were seen.

    ``normalised``: each patch has its own mean and spread taken out.
    """

    pixels: Tensor
    keep: Tensor
    normalised: bool


@dataclass(frozen=True)
class Objects:
    """Predicted text vectors (M, W) of hidden objects, and their numbers (M,) in the batch, type after type."""

    index: Tensor
    vectors: Tensor


class StepLosses(Protocol):
    """The losses of a step. Their means over ranks are those of the whole batch."""

    @property
    def total(self) -> Tensor: ...

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """In the order of the model's ``LOSSES``."""

    @property
    def patches(self) -> Patches | None: ...

    @property
    def objects(self) -> Objects | None: ...


def values_of(losses: StepLosses) -> Tensor:
    """Return the total and the parts (1 + parts,) without their gradients."""
    return torch.stack([x.detach().float() for x in (losses.total, *losses.parts)])


@dataclass(frozen=True)
class Pairs:
    """Projections of images and objects (B, P) that the contrast compares; ``valid`` (B,): tiles that have objects."""

    images: Tensor
    objects: Tensor
    valid: Tensor


class TileEncoder(nn.Module, ABC):
    """A model of tiles and of the OSM objects on them.

    ``MODALITIES``: the encodings that it has, of image, osm and fused; ``MAPS``: those that have a map of the tile, and
    so can be segmented; ``VIEWS``: how many augmented views of an image a step takes.
    """

    METHOD: ClassVar[str]
    LOSSES: ClassVar[tuple[str, ...]]
    MODALITIES: ClassVar[tuple[str, ...]]
    MAPS: ClassVar[tuple[str, ...]]
    VIEWS: ClassVar[int] = 1
    settings: AnyModel

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Width of each encoding that the model has."""

    @property
    @abstractmethod
    def stride(self) -> int:
        """Pixels a cell of the last map."""

    @property
    @abstractmethod
    def image_encoder(self) -> nn.Module:
        """What sees the image alone: what is compiled, exported and started from weights of others."""

    @abstractmethod
    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the last map; UsageError where an image of this size cannot be taken."""

    @abstractmethod
    def default_levels(self) -> tuple[int, ...]:
        """Return the three inner levels that a segmentation reads besides the last map."""

    @abstractmethod
    def level_widths(self, levels: Sequence[int]) -> list[int]: ...

    @property
    def pyramid(self) -> bool:
        """Whether each level is half as large as the one before; else all have one size."""
        return False

    @abstractmethod
    def step(
        self, images: Tensor, graphs: HeteroData, *, seeds: Tensor, gsd_m: Tensor | None, second: Tensor | None
    ) -> StepLosses:
        """Return the pretraining losses of ``images`` (B, C, H, W) and their graphs.

        ``second``: another view of each image, for a model of two ``VIEWS``.
        """

    @abstractmethod
    def encode(
        self,
        images: Tensor | None,
        graphs: HeteroData | None,
        *,
        maps: bool = False,
        levels: Sequence[int] = (),
        gsd_m: Tensor | float | None = None,
    ) -> Encodings:
        """Return the encodings of what is given; ``maps`` and ``levels`` ask for the maps."""

    def pairs(self, images: Tensor, graphs: HeteroData, gsd_m: Tensor | None) -> Pairs | None:
        """Return what a retrieval from images to objects compares; None where a method has no such thing."""
        return None

    @abstractmethod
    def recompute_blocks(self, on: bool) -> None:
        """Let blocks be computed again in the backward pass, to save memory."""

    def map_of_objects(self, query: Tensor, graphs: HeteroData, rows: int, columns: int) -> Tensor | None:
        """Return (B, F, rows, columns): what the vector ``query`` (F,), put on each place of a grid, finds there.

        None where a method has no such map.
        """
        return None

    @abstractmethod
    def unused(self, modality: str, *, maps: bool) -> list[nn.Module | nn.Parameter]:
        """Return the parts that a head of this modality never calls, with ``maps`` or without."""


def check_modality(method: type[TileEncoder], task: TaskSettings) -> None:
    """Raise UsageError where a model of this kind has nothing that the head of ``task`` could see."""
    there = method.MAPS if task.dense else method.MODALITIES
    if task.modality in there:
        return
    lacks = f"no {task.modality} encoding" if task.modality not in method.MODALITIES else "no map of the OSM objects"
    raise UsageError(
        f"{method.METHOD} has {lacks}, so the {task.kind} {task.name} cannot have the modality {task.modality}.",
        hint=f"Choose --modality {' or '.join(there)}, or a checkpoint of another method.",
    )
