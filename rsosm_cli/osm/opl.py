"""Tagged nodes and ways as libosmium's line format (OPL), read into arrays without a Python loop over elements.

Asking pyosmium for every tag and location of every object costs several times what reading the file costs. libosmium
writes the same objects as lines of text in no time, and Arrow parses these lines in C++.
Format: https://osmcode.org/opl-file-format/ (one object a line; ``v`` version, ``d`` deleted, ``T`` tags, ``x``/``y``
location, ``N`` nodes with their locations; characters outside a safe set as ``%hex%``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import map_array
from rsosm_cli.osm.rules import UNINFORMATIVE_KEYS, denies_area, says_area

if TYPE_CHECKING:
    import pyarrow as pa

_NODE_COLUMNS = ["id", "version", "deleted", "tags", "x", "y"]
_WAY_COLUMNS = ["id", "version", "deleted", "tags", "nodes"]
_BLOCK_BYTES = 4 << 20  # parsed at a time: some 50 MB of memory
_ESCAPE = re.compile(r"%([0-9a-fA-F]+)%")
# The nodes of ways as one number triple a line; the columns wanted are the locations.
_TO_LINES = bytes.maketrans(b",Nxy", b"\n\n  ")


@dataclass(frozen=True)
class Tags:
    """Tags of ``N`` objects: those of object i are ``ids[offsets[i]:offsets[i + 1]]`` into ``pairs``."""

    offsets: NDArray[np.int64]  # (N + 1,)
    ids: NDArray[np.int64]  # (sum,)
    pairs: list[tuple[str, str]]

    def arrow(self, rows: NDArray[np.int64]) -> pa.MapArray:
        """Return the tags of the objects ``rows`` as an Arrow map array."""
        import pyarrow as pa

        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        ids = pa.array(self.ids[np.repeat(self.offsets[:-1][rows], counts) + inside])
        keys = pa.array([k for k, _ in self.pairs], pa.string()).take(ids)
        return map_array(offsets, keys, pa.array([v for _, v in self.pairs], pa.string()).take(ids))

    def of(self, row: int) -> dict[str, str]:
        return dict(self.pairs[i] for i in self.ids[self.offsets[row] : self.offsets[row + 1]])

    def any_where(self, flags: list[bool]) -> NDArray[np.bool_]:
        """Return for each object whether any of its tags is flagged; ``flags`` follows ``pairs``."""
        hits = np.concatenate([[0], np.cumsum(np.array(flags, bool)[self.ids])])
        return hits[self.offsets[1:]] > hits[self.offsets[:-1]]

    @cached_property
    def informative(self) -> NDArray[np.bool_]:
        """(N,) whether a tag says more than where the object came from."""
        return self.any_where([k not in UNINFORMATIVE_KEYS for k, _ in self.pairs])

    @cached_property
    def says_area(self) -> NDArray[np.bool_]:
        """(N,) whether the tags make a closed way an area."""
        return self.any_where([says_area(k, v) for k, v in self.pairs]) & ~self.any_where(
            [denies_area(k, v) for k, v in self.pairs]
        )


@dataclass(frozen=True)
class Nodes:
    id: NDArray[np.int64]
    version: NDArray[np.int32]
    tags: Tags
    lonlat: NDArray[np.float64]  # (N, 2), NaN where the file gives no location


@dataclass(frozen=True)
class Ways:
    """Ways; those with a node that the file lacks have no coordinates (``lengths`` 0)."""

    id: NDArray[np.int64]
    version: NDArray[np.int32]
    tags: Tags
    lengths: NDArray[np.int64]  # (N,) nodes of each way
    lonlat: NDArray[np.float64]  # (sum of lengths, 2)


def blocks(path: Path) -> Iterator[bytes]:
    """Return the lines of a file in pieces of some megabytes, each of nodes alone or of ways alone."""
    with path.open("rb") as stream:
        while text := stream.read(_BLOCK_BYTES):
            text += stream.readline()
            # Lines of a kind stand together, so the cut is where the kind changes.
            while text:
                other = b"\nw" if text[:1] == b"n" else b"\nn"
                cut = text.find(other) + 1 or len(text)
                yield text[:cut]
                text = text[cut:]


def in_order(path: Path) -> bool:
    """Return whether all nodes stand before the first way."""
    ways = False
    for text in blocks(path):
        if ways and text[:1] == b"n":
            return False
        ways = ways or text[:1] == b"w"
    return True


def read_nodes(text: bytes) -> Nodes:
    """Return the nodes of lines of OPL."""
    table = _read(text, _NODE_COLUMNS)
    lonlat = np.stack([_numbers(table["x"]), _numbers(table["y"])], axis=1)
    return Nodes(_ids(table["id"]), _ids(table["version"]).astype(np.int32), _tags(table["tags"]), lonlat)


def read_ways(text: bytes) -> Ways:
    """Return the ways of lines of OPL."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    table = _read(text, _WAY_COLUMNS)
    nodes = table["nodes"]
    lengths = pc.add(pc.count_substring(nodes, ","), 1).to_numpy().astype(np.int64)
    unlocated = pc.match_substring(nodes, "xy").to_numpy() | (pc.binary_length(nodes).to_numpy() <= 1)
    lengths[unlocated] = 0
    located = nodes.filter(pa.array(~unlocated))
    lonlat = np.empty((0, 2))
    if len(located):
        lines = b"".join(_bytes(chunk) for chunk in located.chunks).translate(_TO_LINES)
        points = csv.read_csv(
            pa.BufferReader(lines),
            read_options=csv.ReadOptions(column_names=["ref", "x", "y"], block_size=1 << 22),
            parse_options=csv.ParseOptions(delimiter=" ", quote_char=False),
            convert_options=csv.ConvertOptions(
                include_columns=["x", "y"], column_types={"x": pa.float64(), "y": pa.float64()}
            ),
        )
        lonlat = np.stack([points["x"].to_numpy(), points["y"].to_numpy()], axis=1)
    tags = _tags(table["tags"])
    return Ways(_ids(table["id"]), _ids(table["version"]).astype(np.int32), tags, lengths, lonlat)


def _read(text: bytes, columns: list[str]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    return csv.read_csv(
        pa.BufferReader(text),
        # A line must fit into a block: ways have at most 2000 nodes of 40 bytes and tags of 255 characters each.
        read_options=csv.ReadOptions(column_names=columns, block_size=1 << 23),
        parse_options=csv.ParseOptions(delimiter=" ", quote_char=False),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
    )


def _bytes(chunk: pa.StringArray) -> bytes:
    """Return the characters of a string array, one value after the other."""
    offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return bytes(memoryview(chunk.buffers()[2])[offsets[0] : offsets[-1]])


def _ids(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the integers behind a one-letter prefix."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.utf8_slice_codeunits(column, 1).cast(pa.int64()).to_numpy()


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.utf8_slice_codeunits(column, 1)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    return text.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _tags(column: pa.ChunkedArray) -> Tags:
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = pc.split_pattern(pc.utf8_slice_codeunits(column, 1), ",")
    lengths = pc.list_value_length(lists).to_numpy()
    coded = pc.list_flatten(lists).dictionary_encode().unify_dictionaries()
    ids = np.concatenate([c.indices.to_numpy() for c in coded.chunks]).astype(np.int64)
    pairs = []
    for text in coded.chunk(0).dictionary.to_pylist():
        key, _, value = text.partition("=")
        pairs.append((_plain(key), _plain(value)))
    # An object without tags is one empty string.
    if ("", "") in pairs:
        real = ids != pairs.index(("", ""))
        owner = np.repeat(np.arange(len(lengths)), lengths)[real]
        ids, lengths = ids[real], np.bincount(owner, minlength=len(lengths))
    assert isinstance(column, pa.ChunkedArray)
    return Tags(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), ids, pairs)


def _plain(text: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m.group(1), 16)), text) if "%" in text else text
