"""Weights of tags in an object's mean vector. GeoLink (NeurIPS 2025), section 3.1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rsosm_cli.errors import UsageError


def tag_weights(tags: Sequence[str], key_counts: Mapping[str, int], rule: str) -> Tensor:
    """Return the weights (V,) float32 of ``tags`` ("key:value").

    ``count``: occurrences of the tag's key in the pretraining corpus (the paper); ``log``: their ln (the released
    code). A key that the corpus does not have weighs 0; an object whose tags all weigh 0 takes the plain mean of their
    vectors.
    A tag belongs to the longest key of the corpus that it begins with: keys and values both may contain colons.
    """
    if rule not in ("count", "log"):
        raise UsageError(f"There is no tag weight {rule!r}.", hint="Choose count or log.")
    counts = [key_counts.get(_key_of(tag, key_counts), 0) for tag in tags]
    if rule == "log":
        return torch.tensor([math.log(n) if n > 0 else 0.0 for n in counts], dtype=torch.float32)
    return torch.tensor(counts, dtype=torch.float32)


def _key_of(tag: str, known: Mapping[str, int]) -> str:
    key = tag
    while ":" in key:
        key = key.rpartition(":")[0]
        if key in known:
            return key
    return key
