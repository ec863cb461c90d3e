"""The tree of POI categories, key over value, and the numbers that tags have in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsosm_cli.text.encoder import load_text_encoder

ROOT = ""


class TagEncoder(Protocol):
    """What turns tags into rows that the nodes of a graph carry."""

    width: int
    identity: dict[str, str]

    def encode(self, tags: Sequence[str]) -> Tensor: ...


class CategoryRows:
    """Tags as numbers of rows of a table of categories, which the model has among its weights.

    ``names``: of the rows; a tag that is none of them has the row of its key, a key that is none that of the root.
    """

    width = 1

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.identity: dict[str, str] = {}
        self._row = {name: i for i, name in enumerate(self.names)}

    def rows(self, tags: Sequence[str]) -> NDArray[np.int64]:
        """Return the row (T,) of each tag."""
        root = self._row[ROOT]
        found = (self._row.get(tag, self._row.get(key_of(tag), root)) for tag in tags)
        return np.fromiter(found, np.int64, len(tags))

    def encode(self, tags: Sequence[str]) -> Tensor:
        """Return the rows (T, 1) float32, exact below 2 ** 24."""
        return torch.from_numpy(self.rows(tags).astype(np.float32))[:, None]


def key_of(category: str) -> str:
    """Return the parent of a category in the tree: of `amenity:bar`, `amenity`; of a key, the root."""
    return category.partition(":")[0] if ":" in category else ROOT


def category_names(tags: Sequence[str], counts: NDArray[np.int64], least: int) -> tuple[str, ...]:
    """Return the rows of a table: the root, the keys, and ``tags`` (V,) with ``counts`` (V,) of ``least`` or more."""
    met = [tag for tag, n in zip(tags, counts.tolist(), strict=True) if n > 0]
    frequent = {tag for tag, n in zip(tags, counts.tolist(), strict=True) if n >= least}
    return tuple(sorted({ROOT, *map(key_of, met), *frequent}))


def load_tag_encoder(name: str, categories: Sequence[str] = (), *, offline: bool = False) -> TagEncoder:
    """Return what encodes the tags for a checkpoint: its ``categories`` where it has such, else the text model."""
    return CategoryRows(categories) if categories else load_text_encoder(name, offline=offline)
