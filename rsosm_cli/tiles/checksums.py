"""Checksums of a tile store: what was written against what is there.

HDF5's own need chunks, and memory maps need contiguous arrays; so each array carries the CRC-32 of its bytes as an
attribute. Comparing reads the array once, at about a gigabyte a second; opening a store does not, to stay
quick.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from rsosm_cli.errors import FormatError

_NAME = "crc32"
_BYTES_AT_A_TIME = 1 << 20


def seal(file: h5py.File, known: Mapping[str, int]) -> None:
    """Write the checksums of all arrays; ``known`` are those of arrays that need not be read again."""

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            item.attrs[_NAME] = np.uint32(known[name] if name in known else _of_dataset(item))

    file.visititems(visit)


def check(path: Path, *, images: bool = False) -> None:
    """Compare the arrays of a store with their checksums, the images only if asked for.

    Raises :class:`FormatError` for the first that differs. Arrays without one are not compared.
    """

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if not isinstance(item, h5py.Dataset) or _NAME not in item.attrs or (name == "images" and not images):
            return
        if _of_dataset(item) != int(item.attrs[_NAME]):
            raise FormatError(
                f"{path} is damaged: {name} is not as it was written.",
                hint="Build it again with rsosm build-graph --force, or copy it again.",
                path=str(path),
            )

    with h5py.File(path, "r") as file:
        file.visititems(visit)


def _of_dataset(dataset: h5py.Dataset) -> int:
    """Return the CRC-32 of the bytes of an array, of texts that of all of them, each ended by a zero byte."""
    if dataset.dtype.kind == "O":
        return zlib.crc32(b"".join(text + b"\0" for text in dataset[:])) if len(dataset) else 0
    crc = 0
    rows = max(_BYTES_AT_A_TIME // max(dataset.nbytes // max(len(dataset), 1), 1), 1)
    for start in range(0, len(dataset) if dataset.size else 0, rows):
        crc = zlib.crc32(np.ascontiguousarray(dataset[start : start + rows]).view(np.uint8).data, crc)
    return crc
