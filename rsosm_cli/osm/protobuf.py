"""Messages of protocol buffers, many read at once: numbers decoded by numpy, without a loop over them.

Encoding: https://protobuf.dev/programming-guides/encoding/ (a number has 7 bits a byte, the lowest first, and ends with
the first byte below 128; before each field stands its number times 8, plus 0 for a number, 2 for a length and so many
bytes).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.osm.shapes import spread

Numbers = NDArray[np.int64]

_WORD = 4  # bytes of most numbers; longer ones are few
_ENDS = np.uint32(0x80808080)  # the bits that say whether a number goes on


class Messages:
    """Bytes in which messages stand; places are counted from their start."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._padded = np.frombuffer(text + bytes(_WORD), np.uint8)
        self._bytes = self._padded[: len(text)]

    @cached_property
    def _words(self) -> NDArray[np.uint32]:
        """The word from each byte on: four times the bytes, but then numbers are taken from it in one go."""
        return np.ascontiguousarray(np.ndarray((len(self.text),), "<u4", self._padded, strides=(1,)))

    @cached_property
    def _ends(self) -> Numbers:
        """The last byte of each number, were there nothing but numbers."""
        return np.flatnonzero(self._bytes < 0x80)

    @cached_property
    def _ended(self) -> NDArray[np.int32]:
        """How many numbers have ended before each byte, were there nothing but numbers."""
        ended = np.empty(len(self.text) + 1, np.int32)
        ended[0] = 0
        np.cumsum(self._bytes < 0x80, out=ended[1:])
        return ended

    def numbers_at(self, at: Numbers) -> Numbers:
        """Return the number that starts at each place."""
        values = self._words.take(at)
        ends = ~values & _ENDS
        more = np.flatnonzero(ends == 0)
        values &= (ends & -ends) - np.uint32(1)  # up to the end of the number, which is the lowest of these bits
        # 7 bits a byte move together, then 14 bits each two bytes.
        values = (values & np.uint32(0x007F007F)) | ((values & np.uint32(0x7F007F00)) >> np.uint32(1))
        values = (values & np.uint32(0x3FFF)) | ((values & np.uint32(0x3FFF0000)) >> np.uint32(2))
        found, byte = values.astype(np.int64), _WORD
        while len(more):
            following = self._bytes[at[more] + byte]
            found[more] |= (following & 0x7F).astype(np.int64) << (7 * byte)
            more, byte = more[following >= 0x80], byte + 1
        return found

    def after(self, at: Numbers) -> Numbers:
        """Return where the number that starts at each place is over."""
        return self._ends.take(self._ended.take(at)) + 1

    def packed(self, starts: Numbers, sizes: Numbers) -> tuple[Numbers, Numbers]:
        """Return the numbers of many stretches of bytes, and how many each stretch has."""
        first, last = (self._ended.take(places).astype(np.int64) for places in (starts, starts + sizes))
        counts = last - first
        # A number starts after the one before it, which is a length or the name of a field where it is the first.
        return self.numbers_at(self._ends.take(spread(first - 1, counts)) + 1), counts

    def repeated(self, at: int, end: int) -> tuple[Numbers, Numbers]:
        """Return starts and sizes of the members of a message of one repeated field."""
        text, heads = self.text, []
        while at < end:
            heads.append(at)
            size = text[at + 1]
            if size < 0x80:
                at += 2 + size
                continue
            size, shift, at = size & 0x7F, 7, at + 2
            while (byte := text[at]) >= 0x80:
                size, shift, at = size | (byte & 0x7F) << shift, shift + 7, at + 1
            at += 1 + (size | byte << shift)
        lengths = np.array(heads, np.int64) + 1
        return self.after(lengths), self.numbers_at(lengths)

    def fields(
        self, at: Numbers, stops: Numbers, names: dict[str, int]
    ) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
        """Return start and size of the fields ``names`` of many messages, 0 where one is not there.

        Of a field that is a single number its size is the number.
        """
        starts, sizes = ({name: np.zeros(len(at), np.int64) for name in names} for _ in range(2))
        at, named = at.copy(), {tag: name for name, tag in names.items()}
        # All have their fields in one order: read together, the next field of each at a time.
        while len(left := np.flatnonzero(at < stops)):
            tags = self._bytes[at[left]]
            tag = int(tags[0])
            has = left[tags == tag]
            value, after = self.numbers_at(at[has] + 1), self.after(at[has] + 1)
            if tag in named:
                starts[named[tag]][has], sizes[named[tag]][has] = after, value
            at[has] = after + value if tag & 7 == 2 else after
        return starts, sizes

    def of(self, starts: Numbers, sizes: Numbers) -> NDArray[np.uint8]:
        """Return the bytes of many stretches one after the other."""
        return self._bytes[spread(starts, sizes)]


def fields(text: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
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


def signed(values: Numbers) -> Numbers:
    """Return signed numbers from zigzag: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    return (values >> 1) ^ -(values & 1)


def number(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def message(tag: int, body: bytes) -> bytes:
    return bytes([tag]) + number(len(body)) + body
