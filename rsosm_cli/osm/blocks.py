"""Nodes, ways and relations in libosmium's own blocks (PBF, not compressed), read into arrays without a loop over them.

Asking pyosmium for every tag and location of every object costs several times what reading the file costs. libosmium
writes the same objects into a file in no time, and numpy decodes the numbers of some thousand objects at once. Only
strings are walked one by one, each once a block.
Format: https://wiki.openstreetmap.org/wiki/PBF_Format (messages, numbers of fields, differences from value to value).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.elements import map_array
from rsosm_cli.osm.protobuf import Messages, Numbers, fields, message, number, signed
from rsosm_cli.osm.rules import AREA_KEYS, UNINFORMATIVE_KEYS, denies_area, says_area
from rsosm_cli.osm.shapes import spread

if TYPE_CHECKING:
    import pyarrow as pa

# How to ask libosmium for such a file.
FORM = "pbf,pbf_compression=none,add_metadata=version,locations_on_ways=true"
_FIXED_POINT = 1e7  # locations are integers of this part of a degree
# What lies beyond is no place: a node that the file lacks is at 0x7FFFFFFF, and some files hold worse.
_FARTHEST = (1_800_000_000, 900_000_000)
# The byte before each field.
_STRINGS, _GROUP = 0x0A, 0x12  # of a block
_DENSE_NODES, _WAY, _RELATION = 0x12, 0x1A, 0x22  # of a group
_NODE_FIELDS = {"id": 0x0A, "lat": 0x42, "lon": 0x4A, "tags": 0x52}
_DENSE_INFO = 0x2A
_WAY_FIELDS = {"id": 0x08, "keys": 0x12, "values": 0x1A, "info": 0x22, "refs": 0x42, "lat": 0x4A, "lon": 0x52}
_RELATION_FIELDS = {"id": 0x08, "keys": 0x12, "values": 0x1A, "roles": 0x42, "members": 0x4A, "types": 0x52}
_WAY_MEMBER = 1
_WAYS = 8_000  # of a block, as libosmium has them
_PORTION = 100_000  # bytes of relations at a time: some 20,000 members, which take libosmium some 20 MB as ways


@dataclass(frozen=True)
class Strings:
    """The strings of a block, each once."""

    array: pa.StringArray

    def __len__(self) -> int:
        return len(self.array)

    def take(self, numbers: Numbers) -> pa.StringArray:
        import pyarrow as pa

        return self.array.take(pa.array(numbers))

    def among(self, known: list[str]) -> NDArray[np.bool_]:
        """Return which strings are among ``known``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        return pc.is_in(self.array, value_set=pa.array(known)).to_numpy(zero_copy_only=False)

    @cached_property
    def texts(self) -> list[str]:
        return self.array.to_pylist()


@dataclass(frozen=True)
class Tags:
    """Tags of ``N`` objects: those of object i are ``offsets[i]`` to ``offsets[i + 1]`` of ``keys`` and ``values``."""

    offsets: Numbers  # (N + 1,)
    keys: Numbers  # (sum,) into strings
    values: Numbers  # (sum,)
    strings: Strings  # shared with other objects of the block

    def arrow(self, rows: Numbers) -> pa.MapArray:
        """Return the tags of the objects ``rows`` as an Arrow map array."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        chosen = spread(self.offsets[:-1][rows], counts)
        keys, values = (self.strings.take(part[chosen]) for part in (self.keys, self.values))
        return map_array(offsets, keys, values)

    def of(self, row: int) -> dict[str, str]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        texts = self.strings.texts
        return {texts[k]: texts[v] for k, v in zip(self.keys[part].tolist(), self.values[part].tolist(), strict=True)}

    def having(self, key: str, value: str) -> NDArray[np.bool_]:
        """(N,) whether the object has the tag."""
        return self._any(self._where([key]) & self.strings.among([value])[self.values])

    def _any(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return for each object whether any of its tags is flagged."""
        hits = np.concatenate([[0], np.cumsum(flags)])
        return hits[self.offsets[1:]] > hits[self.offsets[:-1]]

    def _where(self, known: list[str]) -> NDArray[np.bool_]:
        """Return which tags have one of the keys ``known``."""
        return self.strings.among(known)[self.keys]

    @cached_property
    def informative(self) -> NDArray[np.bool_]:
        """(N,) whether a tag says more than where the object came from."""
        return self._any(~self._where(sorted(UNINFORMATIVE_KEYS)))

    @cached_property
    def says_area(self) -> NDArray[np.bool_]:
        """(N,) whether the tags make a closed way an area."""
        # Of the keys that can, every pair is judged once.
        tags = np.flatnonzero(self._where(["area", *AREA_KEYS]))
        pairs, which = np.unique(self.keys[tags] * len(self.strings) + self.values[tags], return_inverse=True)
        keys, values = (self.strings.take(part).to_pylist() for part in divmod(pairs, len(self.strings)))
        flags = np.zeros((2, len(self.keys)), bool)
        for flag, judge in zip(flags, (says_area, denies_area), strict=True):
            flag[tags] = np.array([judge(k, v) for k, v in zip(keys, values, strict=True)], bool)[which]
        return self._any(flags[0]) & ~self._any(flags[1])


@dataclass(frozen=True)
class Nodes:
    id: Numbers
    version: NDArray[np.int32]
    tags: Tags
    lonlat: NDArray[np.float64]  # (N, 2), NaN where the file gives no location


@dataclass(frozen=True)
class Ways:
    """Ways; those with a node that the file lacks have no coordinates (``lengths`` 0)."""

    id: Numbers
    version: NDArray[np.int32]
    tags: Tags
    lengths: Numbers  # (N,) nodes of each way
    lonlat: NDArray[np.float64]  # (sum of lengths, 2)
    below_zero: NDArray[np.bool_]  # (N,) of those without coordinates: whether a node of them has an id below zero
    _block: bytes = field(repr=False)
    _strings: slice  # of the block
    _spans: tuple[Numbers, Numbers, Numbers, Numbers]  # in the block: start and end of each way's id, of the rest

    def write(self, rows: Numbers, file: BinaryIO, *, tagged: bool = False) -> None:
        """Append the ways ``rows``, with or without their tags, to a file that begins with :func:`read_header`."""
        if tagged:
            starts, stops = (self._spans[i][rows].tolist() for i in (0, 3))
            ways = [self._block[start:stop] for start, stop in zip(starts, stops, strict=True)]
            _write_ways(ways, file, self._block[self._strings])
        else:
            _write_ways(self.untagged(rows), file)

    def untagged(self, rows: Numbers) -> list[bytes]:
        """Return the messages of the ways ``rows`` without their tags."""
        text, spans = self._block, zip(*(part[rows].tolist() for part in self._spans), strict=True)
        return [text[a:b] + text[c:d] for a, b, c, d in spans]


@dataclass(frozen=True)
class Relations:
    """Relations and those of their members that are ways, grouped by relation."""

    id: Numbers
    tags: Tags
    owner: Numbers  # (M,) relation of each member, from 0
    ways: Numbers  # (M,) id of each member
    outer: NDArray[np.bool_]  # (M,) whether its role is `outer`, or none
    _block: bytes = field(repr=False)
    _strings: slice  # of the block
    _spans: tuple[Numbers, Numbers]  # starts and stops of the relations in the block

    def write(self, file: BinaryIO) -> None:
        """Append the relations to a file that begins with :func:`read_header`."""
        spans = zip(*(part.tolist() for part in self._spans), strict=True)
        relations = b"".join(message(_RELATION, self._block[start:stop]) for start, stop in spans)
        _write_block(self._block[self._strings], relations, file)


def _write_ways(ways: list[bytes], file: BinaryIO, strings: bytes = message(_STRINGS, b"")) -> None:
    _write_block(strings, b"".join(message(_WAY, way) for way in ways), file)


def sort_ways(path: Path) -> None:
    """Put a file of ways into the order that libosmium asks for: by id, negative ones first, from zero away."""
    header = read_header(path)
    found: dict[int, bytes] = {}  # a way that the file has twice is one
    for block in read_blocks(path, relations=False):
        if isinstance(block, Ways):
            found.update(zip(rank(block.id).tolist(), block.untagged(np.arange(len(block.id))), strict=True))
    order = sorted(found)
    with path.open("wb") as file:
        file.write(header)
        for start in range(0, len(order), _WAYS):
            _write_ways([found[number] for number in order[start : start + _WAYS]], file)


def rank(ids: Numbers) -> Numbers:
    """Return numbers (n,) that grow from id to id in the order that libosmium asks for."""
    return np.where(ids > 0, ids, np.iinfo(np.int64).min - ids)


def _write_block(strings: bytes, group: bytes, file: BinaryIO) -> None:
    blob = message(0x0A, message(_STRINGS, strings) + message(_GROUP, group))
    header = message(0x0A, b"OSMData") + b"\x18" + number(len(blob))
    file.write(len(header).to_bytes(4, "big") + header + blob)


def read_blocks(path: Path, *, relations: bool) -> Iterator[Nodes | Ways | Relations]:
    """Return what libosmium wrote in the form :data:`FORM`, some thousand objects of a kind at a time.

    Of relations fewer: some have thousands of members. Without ``relations`` they are passed over.
    """

    for _, blob in _blobs(path):
        text = _content(blob)
        parts = fields(text, 0, len(text))
        groups = [(a, b) for tag, a, b in parts if tag == _GROUP and (relations or text[a] != _RELATION)]
        if not groups:
            continue
        block, table = Messages(text), next(slice(a, b) for tag, a, b in parts if tag == _STRINGS)
        strings = _strings(block, table)
        for start, stop in groups:
            starts, sizes = block.repeated(start, stop)
            stops = starts + sizes
            if text[start] == _DENSE_NODES:
                yield _nodes(block, int(starts[0]), int(stops[0]), strings)
            elif text[start] == _WAY:
                yield _ways(block, table, starts, stops, strings)
            else:
                portion = np.cumsum(sizes) // _PORTION
                for rows in np.split(np.arange(len(portion)), np.flatnonzero(np.diff(portion)) + 1):
                    yield _relations(block, table, starts[rows], stops[rows], strings)


def take_relations(path: Path, target: Path) -> None:
    """Copy the blocks of relations into a file of their own."""
    with target.open("wb") as relations:
        relations.write(read_header(path))
        for head, blob in _blobs(path):
            text = _content(blob)
            # Of each block the first object of each group says what is in it: libosmium never mixes them.
            if _RELATION in {text[start] for tag, start, _ in fields(text, 0, len(text)) if tag == _GROUP}:
                relations.write(head + blob)


def read_header(path: Path) -> bytes:
    """Return the first block of a file, which says what kinds of data are in it."""
    with path.open("rb") as file:
        size = file.read(4)
        header = file.read(int.from_bytes(size, "big"))
        return size + header + file.read(fields(header, 0, len(header))[1][1])


def _blobs(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Return the blocks of a file: four bytes of length and a header that ends in the length of a blob; the blob."""
    with path.open("rb") as file:
        while size := file.read(4):
            header = file.read(int.from_bytes(size, "big"))
            (_, start, stop), (_, length, _) = fields(header, 0, len(header))
            blob = file.read(length)
            if header[start:stop] == b"OSMData":
                yield size + header, blob


def _content(blob: bytes) -> bytes:
    _, start, stop = fields(blob, 0, len(blob))[0]
    return blob[start:stop]


def _strings(block: Messages, table: slice) -> Strings:
    import pyarrow as pa

    starts, sizes = block.repeated(table.start, table.stop)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(block.of(starts, sizes))]
    strings = pa.BinaryArray.from_buffers(pa.binary(), len(sizes), buffers)
    try:
        return Strings(strings.cast(pa.string()))
    except pa.ArrowInvalid:  # some files hold bytes that are no UTF-8
        return Strings(pa.array([s.decode("utf-8", "replace") for s in strings.to_pylist()], pa.string()))


def _nodes(block: Messages, start: int, stop: int, strings: Strings) -> Nodes:
    found = {tag: (a, b) for tag, a, b in fields(block.text, start, stop)}

    def numbers(start: int, stop: int) -> Numbers:
        return block.packed(np.array([start]), np.array([stop - start]))[0]

    part = {name: numbers(*found.get(tag, (0, 0))) for name, tag in _NODE_FIELDS.items()}
    ids = np.cumsum(signed(part["id"]))
    version = np.zeros(len(ids), np.int32)
    for tag, a, b in fields(block.text, *found.get(_DENSE_INFO, (0, 0))):
        if tag == 0x0A:
            version = numbers(a, b).astype(np.int32)
    # Key and value in turn, and a zero after the last of each node.
    listed = part["tags"]
    ends = np.flatnonzero(listed == 0)
    pairs = listed[listed != 0].reshape(-1, 2)
    offsets = np.concatenate([[0], (ends - np.arange(len(ends))) // 2])
    lonlat = np.stack([np.cumsum(signed(part[axis])) for axis in ("lon", "lat")], axis=1)
    where = np.where(_nowhere(lonlat)[:, None], np.nan, lonlat / _FIXED_POINT)
    return Nodes(ids, version, Tags(offsets, pairs[:, 0], pairs[:, 1], strings), where)


def _ways(block: Messages, table: slice, starts: Numbers, stops: Numbers, strings: Strings) -> Ways:
    n = len(starts)
    at, sizes = block.fields(starts, stops, _WAY_FIELDS)
    versioned = np.flatnonzero(sizes["info"])
    version = np.zeros(n, np.int32)
    version[versioned] = block.numbers_at(at["info"][versioned] + 1)
    places, lengths = np.empty((0, 2), np.int64), np.zeros(n, np.int64)
    for axis, name in enumerate(("lon", "lat")):
        steps, lengths = block.packed(at[name], sizes[name])
        if not axis:
            places = np.empty((len(steps), 2), np.int64)
        places[:, axis] = _summed(lengths, steps)
    below_zero = np.zeros(n, bool)
    if (nowhere := _nowhere(places)).any():
        whole = ~np.isin(np.arange(n), np.repeat(np.arange(n), lengths)[nowhere])
        places, lengths = places.compress(np.repeat(whole, lengths), axis=0), np.where(whole, lengths, 0)
        cut = np.flatnonzero(~whole)
        steps, counts = block.packed(at["refs"][cut], sizes["refs"][cut])
        below_zero[np.repeat(cut, counts)[_summed(counts, steps) < 0]] = True
    # Fields stand in the order of their numbers: the tags between the id and the rest.
    after = np.where(sizes["values"] > 0, at["values"] + sizes["values"], at["id"])
    spans = (starts, at["id"], after, stops)
    tags = _tags(block, at, sizes, strings)
    return Ways(sizes["id"], version, tags, lengths, places / _FIXED_POINT, below_zero, block.text, table, spans)


def _nowhere(places: Numbers) -> NDArray[np.bool_]:
    """(N,) which places (N, 2) are none."""
    return (np.abs(places[:, 0]) > _FARTHEST[0]) | (np.abs(places[:, 1]) > _FARTHEST[1])


def _relations(
    block: Messages, table: slice, starts: Numbers, stops: Numbers, strings: Strings
) -> Relations:  # fmt: skip
    at, sizes = block.fields(starts, stops, _RELATION_FIELDS)
    steps, counts = block.packed(at["members"], sizes["members"])
    owner, members = np.repeat(np.arange(len(starts)), counts), _summed(counts, steps)
    is_way = block.packed(at["types"], sizes["types"])[0] == _WAY_MEMBER
    outer = strings.among(["outer", ""])
    roles = block.packed(at["roles"], sizes["roles"])[0][is_way]
    tags = _tags(block, at, sizes, strings)
    return Relations(
        sizes["id"], tags, owner[is_way], members[is_way], outer[roles], block.text, table, (starts, stops)
    )


def _tags(block: Messages, at: dict[str, Numbers], sizes: dict[str, Numbers], strings: Strings) -> Tags:
    keys, counts = block.packed(at["keys"], sizes["keys"])
    values, _ = block.packed(at["values"], sizes["values"])
    return Tags(np.concatenate([[0], np.cumsum(counts)]), keys, values, strings)


def _summed(lengths: Numbers, steps: Numbers) -> Numbers:
    """Return running sums of differences, each stretch of ``lengths`` from its own start."""
    before = np.cumsum(lengths) - lengths
    sums = np.concatenate([[0], np.cumsum(signed(steps))])
    return sums[1:] - np.repeat(sums[before], lengths)
