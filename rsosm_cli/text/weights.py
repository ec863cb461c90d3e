"""Weights of tags in an object's mean vector. GeoLink (NeurIPS 2025), section 3.1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rsosm_cli.errors import FormatError, NoFileError, UsageError


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


def read_key_counts(path: Path) -> dict[str, int]:
    """Return the counts of keys of a table: ``key count``, one a line, whole numbers; empty lines and ``#`` comments.

    Raises :class:`NoFileError` where there is no file and :class:`FormatError` where it is no such table.
    """
    hint = "Write `key count`, one a line, such as: building 123456"
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise NoFileError(f"There is no table of tag counts {path}.", hint=hint, path=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"The table of tag counts {path} cannot be read: {error}.", hint=hint) from error
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        # A key may hold spaces; the count is the last word.
        key, _, count = " ".join(line.split()).rpartition(" ")
        if not key or not (count.isascii() and count.isdigit()):
            raise FormatError(f"Line {number} of {path} is no key and count: {line.strip()[:80]!r}.", hint=hint)
        if key in counts:
            raise FormatError(f"Line {number} of {path} gives the key {key!r} again.", hint="Give each key one count.")
        counts[key] = int(count)
    if not any(counts.values()):
        raise FormatError(f"The table of tag counts {path} counts no key.", hint=hint)
    return counts


def _key_of(tag: str, known: Mapping[str, int]) -> str:
    key = tag
    while ":" in key:
        key = key.rpartition(":")[0]
        if key in known:
            return key
    return key
