"""What a model gets of the tags of a city, by the text model and the key counts of its checkpoint."""

from __future__ import annotations

import logging

import numpy as np
import torch

from rsosm_cli.models.checkpoint import Description
from rsosm_cli.text.categories import TagEncoder, load_tag_encoder
from rsosm_cli.text.weights import tag_weights
from rsosm_cli.tiles.tags import Selection, TagInputs

log = logging.getLogger("rsosm")


class TagTable:
    """Grows with the tags that are met, each encoded once; a city is read block by block."""

    def __init__(self, description: Description, device: torch.device, *, offline: bool = False) -> None:
        self.description = description
        self.device = device
        self.offline = offline
        self._encoder: TagEncoder | None = None
        self._row: dict[str, int] = {}
        width = 1 if description.categories else description.text.width  # a category is a number
        self._vectors = torch.zeros(0, width, device=device)
        self._weights = torch.zeros(0, device=device)

    def of(self, tags: tuple[str, ...]) -> TagInputs:
        """Return what makes graphs of the vocabulary ``tags`` the model's inputs, on the device."""
        new = [tag for tag in tags if tag not in self._row]
        if new:
            d = self.description
            vectors = self._text().encode(new)
            weights = tag_weights(new, d.key_counts, d.tag_weight)
            self._vectors = torch.cat([self._vectors, vectors.to(self.device)])
            self._weights = torch.cat([self._weights, weights.to(self.device)])
            self._row |= {tag: len(self._row) + i for i, tag in enumerate(new)}
        rows = torch.from_numpy(np.fromiter((self._row[tag] for tag in tags), np.int64, len(tags))).to(self.device)
        selection = Selection.of(self.description.model)
        return TagInputs(self._vectors[rows], self._weights[rows], selection, selection.ranks(tags))

    def _text(self) -> TagEncoder:
        if self._encoder is None:
            text = self.description.text
            self._encoder = load_tag_encoder(text.encoder, self.description.categories, offline=self.offline)
            known, here = text.identity.get("sha256"), self._encoder.identity.get("sha256")
            if known and here and known != here:
                log.warning("The text model %s is not the one that the checkpoint was trained with.", text.encoder)
        return self._encoder
