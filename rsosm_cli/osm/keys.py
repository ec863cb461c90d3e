"""The numbers that decide about order and duplicates of elements, in files: those of a country fill gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KINDS = {"type": np.uint8, "id": np.int64, "kind": np.uint8, "version": np.int32, "curve": np.uint64}
# Elements sorted at a time, and the most portions that they come in: each looks for its own among all.
_PORTION, _PORTIONS = 1 << 18, 64
_SAMPLE = 1 << 16  # values that tell where portions end


class Keys:
    """Context manager of one file a number in ``folder``: 22 bytes an element.

    ``type``: index into ``OSM_TYPES``; ``kind``: index into ``KINDS``; ``curve``: place on a space-filling curve.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = {name: folder / f"keys-{name}" for name in _KINDS}
        self._stack = ExitStack()
        self._length = 0

    def __enter__(self) -> Keys:
        self._files = {name: self._stack.enter_context(path.open("wb")) for name, path in self._paths.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._stack.close()
        except OSError:  # what could not be written is tried again on closing: the first error says why
            if kind is None:
                raise

    def __len__(self) -> int:
        return self._length

    def add(self, **numbers: NDArray[Any]) -> None:
        """Append the numbers of some elements, (n,) of each name."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(numbers[name], _KINDS[name]).data)
        self._length += len(numbers["id"])

    def column(self, name: str) -> NDArray[Any]:
        """Return a number of all elements added so far, (N,), which stays in its file."""
        self._files[name].flush()
        if not self._length:
            return np.empty(0, _KINDS[name])
        return np.memmap(self._paths[name], _KINDS[name], "r", shape=(self._length,))

    def in_parts(self, name: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield a number of some elements at a time, with the row of the first of them."""
        values = self.column(name)
        for start in range(0, self._length, _PORTION):
            yield start, values[start : start + _PORTION]

    def rows_of(self, type_: int, ids: NDArray[np.int64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the rows of the elements of a type and with one of the ``ids``, of those flagged in ``among`` (N,)."""
        found = [np.empty(0, np.int64)]
        for start, types in self.in_parts("type"):
            rows = start + np.flatnonzero((types == type_) & among[start : start + len(types)])
            found.append(rows[np.isin(self.column("id")[rows], ids)])
        return np.concatenate(found)

    def newest(self) -> NDArray[np.bool_]:
        """Return which elements are the highest version of theirs, of equal ones the first; (N,)."""
        stays = np.zeros(self._length, bool)
        ids, types, versions = (self.column(name) for name in ("id", "type", "version"))
        for rows in self._portions("id", np.ones(self._length, bool)):
            of_id, of_type = ids[rows], types[rows]
            order = np.lexsort((-versions[rows], of_id, of_type))  # stable
            of_id, of_type = of_id[order], of_type[order]
            first = np.ones(len(rows), bool)
            first[1:] = (of_id[1:] != of_id[:-1]) | (of_type[1:] != of_type[:-1])
            stays[rows[order[first]]] = True
        return stays

    def along_the_curve(self, stays: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
        """Yield the rows that stay some at a time, by place and, where several share one, by type and id."""
        names = ("id", "type", "curve")
        for rows in self._portions("curve", stays):
            yield rows[np.lexsort([self.column(name)[rows] for name in names])]

    def _portions(self, name: str, wanted: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
        """Yield the rows wanted by their values of a number, from the smallest on; rows of equal values together."""
        values = self.column(name)
        step = max(_PORTION, -(-self._length // _PORTIONS))
        if self._length <= step:
            yield np.flatnonzero(wanted)
            return
        sample = np.sort(values[:: -(-self._length // _SAMPLE)])
        edges = np.unique(sample[:: max(1, len(sample) * step // self._length)][1:])
        for low, high in zip([None, *edges], [*edges, None], strict=True):
            parts = []
            for start in range(0, self._length, step):
                part, mine = values[start : start + step], wanted[start : start + step].copy()
                if low is not None:
                    mine &= part >= low
                if high is not None:
                    mine &= part < high
                parts.append(start + np.flatnonzero(mine))
            yield np.concatenate(parts)
