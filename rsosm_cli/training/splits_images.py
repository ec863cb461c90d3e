"""Splitting images that lie nowhere: folders of chips, classes and pairs.

Without a place there is no ground to split by. The parts are those that the data set's folders name, or a table's
(``split.file``: columns ``name`` and ``split``), or, by city, those of the names before the first underscore; else
images are drawn one by one, alike in their classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.errors import FormatError, UsageError
from rsosm_cli.settings import SplitSettings
from rsosm_cli.training.splits import PARTS, SPELLINGS, UNUSED, Split, draw_parts

_NEAR = (
    "The images have no place, so they are split one by one: pictures of the same ground can fall on both sides. "
    "Folders train, val and test, or a table (--set split.by=file split.file=parts.csv), say the parts."
)


def split_images(
    names: Sequence[str], known: NDArray[np.int8], content: NDArray[np.float64], settings: SplitSettings, seed: int
) -> Split:
    """Split ``N`` images by ``known`` (N,) parts of the data set (-1: it does not say), a table, cities, or at random.

    ``content`` (N, K): what each holds of the classes. Every image is a block of its own. Raises :class:`UsageError`.
    """
    shares = np.array([settings.train, settings.validation, 1 - settings.train - settings.validation])
    notes: tuple[str, ...] = ()
    if settings.by == "file":
        part = _of_table(names, Path(str(settings.file)))
    elif settings.by == "city":
        part = _of_cities(names, settings.test_cities)
    elif (known >= 0).any():
        part = known.copy()
    else:
        part = draw_parts(np.arange(len(names)), content, len(names), shares, seed)
        notes = (_NEAR,)
    if settings.by != "file" and settings.validation > 0 and not (part == 1).any():
        rest = np.flatnonzero(part == 0)
        inner = np.array([settings.train, settings.validation, 0.0]) / (settings.train + settings.validation)
        if len(rest) > 1:
            part[rest] = draw_parts(np.arange(len(rest)), content[rest], len(rest), inner, seed)
    if not (part == 2).any() and (part == 1).any():
        part[part == 1] = 2
        notes += ("The data set has no test part: what it calls validation tests, and the last epoch is kept.",)
    for name, number in (("train", 0), ("test", 2)):
        if not (part == number).any():
            raise UsageError(f"The split leaves no image to the {name} part.", hint="Add images, or name other parts.")
    if not (part == PARTS.index("validation")).any():
        notes += ("No image is left to choose the epoch by: the last one is kept.",)
    return Split(part.astype(np.int8), np.arange(len(names)), 0.0, (), notes)


def _of_table(names: Sequence[str], path: Path) -> NDArray[np.int8]:
    import pandas

    try:
        table = pandas.read_csv(path)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a table of parts: {error}.") from error
    if not {"name", "split"} <= set(table.columns):
        raise UsageError(f"{path} has no columns `name` and `split`.", hint="One row an image: its name and its part.")
    said = {str(n): str(s).strip().casefold() for n, s in zip(table["name"], table["split"], strict=True)}
    unknown = sorted({s for s in said.values() if s not in SPELLINGS})
    if unknown:
        raise UsageError(f"{path} names the parts {', '.join(unknown[:5])}.", hint="Known: train, validation, test.")
    found = [said.get(name, said.get(name.rsplit("/", 1)[-1], "")) for name in names]
    return np.array([SPELLINGS.get(word, UNUSED) for word in found], np.int8)


def _of_cities(names: Sequence[str], tests: Sequence[str]) -> NDArray[np.int8]:
    cities = [name.rsplit("/", 1)[-1].split("_", 1)[0].casefold() for name in names]
    unknown = [c for c in tests if c.casefold() not in cities]
    if unknown:
        raise UsageError(
            f"split.test_cities names {', '.join(unknown)}, and no image's name begins with it.",
            hint=f"They begin with {', '.join(sorted(set(cities))[:8])}.",
        )
    wanted = {c.casefold() for c in tests}
    return np.array([2 if city in wanted else 0 for city in cities], np.int8)
