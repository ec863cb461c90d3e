"""Nodes, ways and relations in libosmium's own blocks (PBF, not compressed), read into arrays without a loop over them.

Asking pyosmium for every tag and location of every object costs several times what reading the file costs. libosmium
writes the same objects into a file in no time, and as all their fields are numbers of one kind (varints), numpy decodes
those of some thousand objects at once. Only strings are walked one by one, each once a block.
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
from rsosm_cli.osm.rules import AREA_KEYS, UNINFORMATIVE_KEYS, denies_area, says_area
from rsosm_cli.osm.shapes import spread

if TYPE_CHECKING:
    import pyarrow as pa

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]

# How to ask libosmium for such a file.
FORM = "pbf,pbf_compression=none,add_metadata=version,locations_on_ways=true"
_FIXED_POINT = 1e7  # locations are integers of this part of a degree
_NOWHERE = 0x7FFFFFFF  # and this where a node is not in the file
# Before each field stands a byte: its number times 8; plus 0 for a number, 2 for a length and that many bytes.
_STRINGS, _GROUP = 0x0A, 0x12  # of a block
_DENSE_NODES, _WAY, _RELATION = 0x12, 0x1A, 0x22  # of a group
_NODE_FIELDS = {"id": 0x0A, "info": 0x2A, "lat": 0x42, "lon": 0x4A, "tags": 0x52}
_WAY_FIELDS = {"id": 0x08, "keys": 0x12, "values": 0x1A, "info": 0x22, "refs": 0x42, "lat": 0x4A, "lon": 0x52}
_RELATION_FIELDS = {"id": 0x08, "keys": 0x12, "values": 0x1A, "roles": 0x42, "members": 0x4A, "types": 0x52}
_WAY_MEMBER = 1
_PORTION = 100_000  # bytes of relations at a time: some 20,000 members, which take libosmium some 20 MB as ways


@dataclass(frozen=True)
class Tags:
    """Tags of ``N`` objects: those of object i are ``offsets[i]`` to ``offsets[i + 1]`` of ``keys`` and ``values``."""

    offsets: Numbers  # (N + 1,)
    keys: Numbers  # (sum,) into strings
    values: Numbers  # (sum,)
    strings: pa.StringArray

    def arrow(self, rows: Numbers) -> pa.MapArray:
        """Return the tags of the objects ``rows`` as an Arrow map array."""
        import pyarrow as pa

        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        chosen = spread(self.offsets[:-1][rows], counts)
        keys, values = (self.strings.take(pa.array(part[chosen])) for part in (self.keys, self.values))
        return map_array(offsets, keys, values)

    def of(self, row: int) -> dict[str, str]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        texts = self._texts
        return {texts[k]: texts[v] for k, v in zip(self.keys[part].tolist(), self.values[part].tolist(), strict=True)}

    @cached_property
    def _texts(self) -> list[str]:
        return self.strings.to_pylist()

    def having(self, key: str, value: str) -> NDArray[np.bool_]:
        """(N,) whether the object has the tag."""
        return self._any(self._where([key]) & self._among([value])[self.values])

    def _any(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return for each object whether any of its tags is flagged."""
        hits = np.concatenate([[0], np.cumsum(flags)])
        return hits[self.offsets[1:]] > hits[self.offsets[:-1]]

    def _where(self, known: list[str]) -> NDArray[np.bool_]:
        """Return which tags have one of the keys ``known``."""
        return self._among(known)[self.keys]

    def _among(self, known: list[str]) -> NDArray[np.bool_]:
        """Return which strings are among ``known``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        return pc.is_in(self.strings, value_set=pa.array(known)).to_numpy(zero_copy_only=False)

    @cached_property
    def informative(self) -> NDArray[np.bool_]:
        """(N,) whether a tag says more than where the object came from."""
        return self._any(~self._where(sorted(UNINFORMATIVE_KEYS)))

    @cached_property
    def says_area(self) -> NDArray[np.bool_]:
        """(N,) whether the tags make a closed way an area."""
        import pyarrow as pa

        # Of the keys that can, every pair is judged once.
        tags = np.flatnonzero(self._where(["area", *AREA_KEYS]))
        pairs, which = np.unique(self.keys[tags] * len(self.strings) + self.values[tags], return_inverse=True)
        keys, values = (self.strings.take(pa.array(part)).to_pylist() for part in divmod(pairs, len(self.strings)))
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
    _block: bytes = field(repr=False)
    _spans: tuple[Numbers, Numbers, Numbers, Numbers]  # in the block: start and end of each way's id, of the rest

    def write(self, rows: Numbers, file: BinaryIO) -> None:
        """Append the ways ``rows``, without their tags, to a file that begins with :func:`read_header`."""
        text, spans = self._block, zip(*(part[rows].tolist() for part in self._spans), strict=True)
        ways = b"".join(_message(_WAY, text[a:b] + text[c:d]) for a, b, c, d in spans)
        _write_block(_message(_STRINGS, b""), ways, file)


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
        relations = b"".join(_message(_RELATION, self._block[start:stop]) for start, stop in spans)
        _write_block(self._block[self._strings], relations, file)


def _write_block(strings: bytes, group: bytes, file: BinaryIO) -> None:
    blob = _message(0x0A, _message(_STRINGS, strings) + _message(_GROUP, group))
    header = _message(0x0A, b"OSMData") + b"\x18" + _number(len(blob))
    file.write(len(header).to_bytes(4, "big") + header + blob)


def read_blocks(path: Path, *, relations: bool) -> Iterator[Nodes | Ways | Relations]:
    """Return what libosmium wrote in the form :data:`FORM`, some thousand objects of a kind at a time.

    Of relations fewer: some have thousands of members. Without ``relations`` they are passed over.
    """
    import pyarrow as pa

    for _, blob in _blobs(path):
        text = _content(blob)
        data = np.frombuffer(text, np.uint8)
        fields = _fields(text, 0, len(text))
        table = next(slice(a, b) for tag, a, b in fields if tag == _STRINGS)
        starts, stops = _members(text, table.start, table.stop)
        strings = _text(pa.array([text[a:b] for a, b in zip(starts, stops, strict=True)], pa.binary()))
        for tag, start, stop in fields:
            if tag != _GROUP:
                continue
            starts, stops = _members(text, start, stop)
            if text[start] == _DENSE_NODES:
                yield _nodes(text, data, starts[0], stops[0], strings)
                continue
            spans = np.array(starts, np.int64), np.array(stops, np.int64)
            if text[start] == _WAY:
                yield _ways(text, data, spans, strings)
            elif relations:
                portion = np.cumsum(spans[1] - spans[0]) // _PORTION
                for rows in np.split(np.arange(len(portion)), np.flatnonzero(np.diff(portion)) + 1):
                    yield _relations(text, data, table, (spans[0][rows], spans[1][rows]), strings)


def take_relations(path: Path, target: Path) -> bool:
    """Copy the blocks of relations into a file of their own; return whether no node of ``path`` stands after a way."""
    ways, ordered = False, True
    with target.open("wb") as relations:
        relations.write(read_header(path))
        for head, blob in _blobs(path):
            text = _content(blob)
            # Of each block the first object of each group says what is in it: libosmium never mixes them.
            kinds = {text[start] for tag, start, _ in _fields(text, 0, len(text)) if tag == _GROUP}
            if _RELATION in kinds:
                relations.write(head + blob)
            ordered &= not (ways and _DENSE_NODES in kinds)
            ways |= _WAY in kinds
    return ordered


def read_header(path: Path) -> bytes:
    """Return the first block of a file, which says what kinds of data are in it."""
    with path.open("rb") as file:
        size = file.read(4)
        header = file.read(int.from_bytes(size, "big"))
        return size + header + file.read(_fields(header, 0, len(header))[1][1])


def _blobs(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Return the blocks of a file: four bytes of length and a header that ends in the length of a blob; the blob."""
    with path.open("rb") as file:
        while size := file.read(4):
            header = file.read(int.from_bytes(size, "big"))
            (_, start, stop), (_, length, _) = _fields(header, 0, len(header))
            blob = file.read(length)
            if header[start:stop] == b"OSMData":
                yield size + header, blob


def _content(blob: bytes) -> bytes:
    _, start, stop = _fields(blob, 0, len(blob))[0]
    return blob[start:stop]


def _text(strings: pa.BinaryArray) -> pa.StringArray:
    import pyarrow as pa

    try:
        return strings.cast(pa.string())
    except pa.ArrowInvalid:  # some files hold bytes that are no UTF-8
        return pa.array([s.decode("utf-8", "replace") for s in strings.to_pylist()], pa.string())


def _fields(text: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """Return the fields of one message: first byte, then start and stop; of a single number itself, twice."""
    found = []
    while at < end:
        tag, value, shift = text[at], 0, 0
        at += 1
        if tag >= 0x80:  # numbers of fields above 15: of the granularity, which is the usual one
            at += 1
        while (byte := text[at]) >= 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            at += 1
        value |= byte << shift
        at += 1
        if tag & 7 == 2:
            found.append((tag, at, at + value))
            at += value
        else:
            found.append((tag, value, value))
    return found


def _members(text: bytes, at: int, end: int) -> tuple[list[int], list[int]]:
    """Return starts and stops of the members of a message of one repeated field: as :func:`_fields`, but quicker."""
    starts, stops = [], []
    while at < end:
        size, at = text[at + 1], at + 2
        if size >= 0x80:
            size, shift = size & 0x7F, 7
            while (byte := text[at]) >= 0x80:
                size, shift, at = size | (byte & 0x7F) << shift, shift + 7, at + 1
            size, at = size | byte << shift, at + 1
        starts.append(at)
        at += size
        stops.append(at)
    return starts, stops


def _nodes(text: bytes, data: Bytes, start: int, stop: int, strings: pa.StringArray) -> Nodes:
    found = {tag: (a, b) for tag, a, b in _fields(text, start, stop)}
    part = {name: data[slice(*found.get(tag, (0, 0)))] for name, tag in _NODE_FIELDS.items()}
    ids = np.cumsum(_signed(_numbers(part["id"])))
    version = np.zeros(len(ids), np.int32)
    for tag, a, b in _fields(text, *found[_NODE_FIELDS["info"]]) if len(part["info"]) else []:
        if tag == 0x0A:
            version = _numbers(data[a:b]).astype(np.int32)
    # Key and value in turn, and a zero after the last of each node.
    listed = _numbers(part["tags"])
    ends = np.flatnonzero(listed == 0)
    pairs = listed[listed != 0].reshape(-1, 2)
    offsets = np.concatenate([[0], (ends - np.arange(len(ends))) // 2])
    lonlat = np.stack([np.cumsum(_signed(_numbers(part[axis]))) for axis in ("lon", "lat")], axis=1)
    where = np.where(lonlat == _NOWHERE, np.nan, lonlat / _FIXED_POINT)
    return Nodes(ids, version, Tags(offsets, pairs[:, 0], pairs[:, 1], strings), where)


def _ways(text: bytes, data: Bytes, spans: tuple[Numbers, Numbers], strings: pa.StringArray) -> Ways:
    n = len(spans[0])
    starts, sizes = _found(data, *spans, _WAY_FIELDS)
    versioned = np.flatnonzero(sizes["info"])
    version = np.zeros(n, np.int32)
    version[versioned] = _number_at(data, starts["info"][versioned] + 1)[0]
    lon, lengths = _packed(data, starts["lon"], sizes["lon"])
    lat, _ = _packed(data, starts["lat"], sizes["lat"])
    lonlat = np.stack(_summed(lengths, lon, lat), axis=1)
    lost = np.repeat(np.arange(n), lengths)[(lonlat == _NOWHERE).any(axis=1)]
    if len(lost):
        whole = ~np.isin(np.arange(n), lost)
        lonlat, lengths = lonlat[np.repeat(whole, lengths)], np.where(whole, lengths, 0)
    tags = _tags(data, starts, sizes, strings)
    # Fields stand in the order of their numbers: the tags between the id and the rest.
    after = np.where(sizes["values"] > 0, starts["values"] + sizes["values"], starts["id"])
    untagged = (spans[0], starts["id"], after, spans[1])
    return Ways(sizes["id"], version, tags, lengths, lonlat / _FIXED_POINT, text, untagged)


def _relations(
    text: bytes, data: Bytes, table: slice, spans: tuple[Numbers, Numbers], strings: pa.StringArray
) -> Relations:  # fmt: skip
    import pyarrow as pa
    import pyarrow.compute as pc

    starts, sizes = _found(data, *spans, _RELATION_FIELDS)
    steps, counts = _packed(data, starts["members"], sizes["members"])
    owner, (members,) = np.repeat(np.arange(len(spans[0])), counts), _summed(counts, steps)
    is_way = _packed(data, starts["types"], sizes["types"])[0] == _WAY_MEMBER
    outer = pc.is_in(strings, value_set=pa.array(["outer", ""])).to_numpy(zero_copy_only=False)
    roles = _packed(data, starts["roles"], sizes["roles"])[0]
    tags = _tags(data, starts, sizes, strings)
    return Relations(sizes["id"], tags, owner[is_way], members[is_way], outer[roles[is_way]], text, table, spans)


def _found(
    data: Bytes, at: Numbers, stops: Numbers, fields: dict[str, int]
) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """Return start and size of each field of many messages, 0 where it is not there; of a single number, itself."""
    starts, sizes = ({name: np.zeros(len(at), np.int64) for name in fields} for _ in range(2))
    at, names = at.copy(), {tag: name for name, tag in fields.items()}
    # All have their fields in one order: read together, the next field of each at a time.
    while len(left := np.flatnonzero(at < stops)):
        tags = data[at[left]]
        tag = int(tags[0])
        has = left[tags == tag]
        value, after = _number_at(data, at[has] + 1)
        if tag in names:
            starts[names[tag]][has], sizes[names[tag]][has] = after, value
        at[has] = after + value if tag & 7 == 2 else after
    return starts, sizes


def _tags(data: Bytes, starts: dict[str, Numbers], sizes: dict[str, Numbers], strings: pa.StringArray) -> Tags:
    keys, counts = _packed(data, starts["keys"], sizes["keys"])
    values, _ = _packed(data, starts["values"], sizes["values"])
    return Tags(np.concatenate([[0], np.cumsum(counts)]), keys, values, strings)


def _summed(lengths: Numbers, *steps: Numbers) -> list[Numbers]:
    """Return running sums of differences, each stretch of ``lengths`` from its own start."""
    before = np.cumsum(lengths) - lengths
    found = []
    for part in steps:
        sums = np.concatenate([[0], np.cumsum(_signed(part))])
        found.append(sums[1:] - np.repeat(sums[before], lengths))
    return found


def _packed(data: Bytes, starts: Numbers, sizes: Numbers) -> tuple[Numbers, Numbers]:
    """Return the numbers of many stretches of bytes, and how many each stretch has."""
    part = data[spread(starts, sizes)]
    ends = np.concatenate([[0], np.cumsum(part < 0x80)])
    last = np.cumsum(sizes)
    return _numbers(part), ends[last] - ends[last - sizes]


def _numbers(data: Bytes) -> Numbers:
    """Return numbers written one after the other: 7 bits a byte, the lowest first, the last byte below 128."""
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    values = (data[starts] & 0x7F).astype(np.int64)
    longer = np.flatnonzero(ends > starts)
    shift = 1
    while len(longer):
        values[longer] |= (data[starts[longer] + shift] & 0x7F).astype(np.int64) << (7 * shift)
        longer = longer[ends[longer] > starts[longer] + shift]
        shift += 1
    return values


def _number_at(data: Bytes, at: Numbers) -> tuple[Numbers, Numbers]:
    """Return the number at each position, and the position after it."""
    value, after, shift = np.zeros(len(at), np.int64), at.copy(), 0
    more = np.arange(len(at))
    while len(more):
        byte = data[after[more]]
        value[more] |= (byte & 0x7F).astype(np.int64) << shift
        after[more] += 1
        more, shift = more[byte >= 0x80], shift + 7
    return value, after


def _signed(values: Numbers) -> Numbers:
    """Return signed numbers from zigzag: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    return (values >> 1) ^ -(values & 1)


def _number(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def _message(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + _number(len(body)) + body
