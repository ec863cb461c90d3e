"""Tags as numbers: the sorted vocabulary of ``key:value`` strings, and which keys enter it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property, lru_cache
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import Elements
from rsosm_cli.settings import NAME_KEYS, TagSettings

# The kind of thing that an element is, by the first of these keys that it carries; the code is the place in the list.
# The first six are the keys of Rose (`highway` is its "roads"); the others serve categories of points of interest.
CLASS_KEYS: tuple[str, ...] = (
    "amenity", "building", "landuse", "leisure", "natural", "highway", "shop", "tourism", "office", "railway",
    "public_transport", "waterway", "historic", "man_made", "aeroway", "healthcare", "craft", "sport", "place", "power",
    "barrier", "boundary",
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """``tags``: sorted, distinct ``key:value`` strings; ``keys``: the key of each (a key may itself hold colons)."""

    tags: tuple[str, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tags)

    @classmethod
    def of(cls, elements: Elements, settings: TagSettings) -> Vocabulary:
        """Return the vocabulary of the tags that ``settings`` let in."""
        pairs = set(chain.from_iterable(map(dict.items, elements.tags)))
        admitted = admitted_keys({key for key, _ in pairs}, settings)
        return cls.from_pairs((key, value) for key, value in pairs if key in admitted)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]]) -> Vocabulary:
        # `a:b` = `c` and `a` = `b:c` are one text; the longer key wins, whatever the order.
        found: dict[str, str] = {}
        for key, value in pairs:
            text = f"{key}:{value}" if value else key
            if len(key) > len(found.get(text, "")):
                found[text] = key
        tags = tuple(sorted(found))
        return cls(tags, tuple(found[tag] for tag in tags))

    @classmethod
    def union(cls, vocabularies: Sequence[Vocabulary]) -> Vocabulary:
        pairs = chain.from_iterable(zip(v.keys, v.tags, strict=True) for v in vocabularies)
        return cls.from_pairs((key, tag[len(key) + 1 :]) for key, tag in pairs)

    def key_of(self, i: int) -> str:
        """Return the key of tag number ``i``."""
        return self.keys[i]

    @cached_property
    def _number(self) -> dict[tuple[str, str], int]:
        """The number of every (key, value) that reads as one of the tags, wherever its colon is taken to stand."""
        number = {}
        for i, tag in enumerate(self.tags):
            number[tag, ""] = i
            at = tag.find(":")
            while at >= 0:
                if at + 1 < len(tag):
                    number[tag[:at], tag[at + 1 :]] = i
                at = tag.find(":", at + 1)
        return number

    @cached_property
    def class_codes(self) -> NDArray[np.int16]:
        """Return (V,) the place of each tag's key in :data:`CLASS_KEYS`; one past the end for others."""
        codes = {key: i for i, key in enumerate(CLASS_KEYS)}
        return np.array([codes.get(key, len(CLASS_KEYS)) for key in self.keys], dtype=np.int16)

    def encode(self, tags: Sequence[dict[str, str]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return (N + 1,) offsets and the tag numbers of ``N`` elements, ascending; unknown tags are left out."""
        counts = np.fromiter(map(len, tags), np.int64, len(tags))
        pairs = chain.from_iterable(map(dict.items, tags))
        ids = np.fromiter(map(self._number.get, pairs, repeat(-1)), np.int64, int(counts.sum()))
        owner = np.repeat(np.arange(len(tags)), counts)
        known = ids >= 0
        owner, ids = owner[known], ids[known]
        ordered = np.sort(owner * len(self.tags) + ids)
        offsets = np.zeros(len(tags) + 1, np.int64)
        np.cumsum(np.bincount(owner, minlength=len(tags)), out=offsets[1:])
        return offsets, (ordered % max(len(self.tags), 1)).astype(np.int32)


def admitted_keys(keys: Iterable[str], settings: TagSettings) -> set[str]:
    """Return those of ``keys`` that no exclusion pattern matches; names only where ``settings.names``."""
    patterns = settings.exclude if settings.names else (*settings.exclude, *NAME_KEYS)
    return {key for key in keys if not matches(key, patterns)}


def matches(key: str, patterns: Sequence[str]) -> bool:
    """Return whether a key meets any of the shell patterns (case matters, as it does in OSM)."""
    return bool(patterns) and _compiled(tuple(patterns)).match(key) is not None


@lru_cache(maxsize=64)
def _compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)))
