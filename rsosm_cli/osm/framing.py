"""Whether bytes that arrive are one PBF file of OSM, told from its blocks without unpacking one.

A block is four bytes of length, a header of that length with the block's type and the length of its data, and the data:
https://wiki.openstreetmap.org/wiki/PBF_Format. What is refused here is what libosmium, which reads the file later,
refuses: a first block that is no header, any other that is no data, lengths beyond the limits of the format.
"""

from __future__ import annotations

from pathlib import Path

from rsosm_cli.osm.protobuf import fields

_LENGTH = 4  # bytes, the highest first
_MOST_HEADER, _MOST_DATA = 64 << 10, 32 << 20  # bytes, the limits of the format
_TYPE, _DATASIZE = 0x0A, 0x18
_NO_EXTRACT = "the answer is not an OSM file"


class Framing:
    """Follows the blocks of a file through its bytes, in pieces of any size."""

    def __init__(self) -> None:
        self.size = 0  # bytes followed
        self.blocks = 0  # begun
        self._start = 0  # where the next block begins
        self._left = 0  # bytes of data to pass over
        self._head = b""  # the begun length and header of the next block

    def feed(self, piece: bytes) -> str:
        """Follow the next bytes; return what is wrong with them, "" where nothing."""
        at = 0
        while at < len(piece):
            if self._left:
                step = min(self._left, len(piece) - at)
                self._left -= step
            else:
                self._start = self._start if self._head else self.size
                step = min(self._wanted(), len(piece) - at)
                self._head += piece[at : at + step]
                if self._wanted() > _MOST_HEADER or (self._wanted() == 0 and not self._begin()):
                    return self._wrong(piece[at + step :])
            at += step
            self.size += step
        return ""

    def follow(self, file: Path) -> str:
        """Follow what a file holds, its headers alone read; return as :meth:`feed`."""
        end = file.stat().st_size
        with file.open("rb") as stream:
            while self.size < end:
                step = min(self._left, end - self.size)
                self._left -= step
                self.size += step
                stream.seek(self.size)
                if problem := self.feed(stream.read(self._wanted())):
                    return problem
        return ""

    def ended(self) -> str:
        """Return what is wrong with a file that ends here: "" where its last block is whole."""
        if not self.blocks:
            return _NO_EXTRACT
        return f"it broke off after {self.size} bytes, within a block" if self._left or self._head else ""

    def _wanted(self) -> int:
        """Return how many bytes are lacking of the next block's length and header."""
        if len(self._head) < _LENGTH:
            return _LENGTH - len(self._head)
        return _LENGTH + int.from_bytes(self._head[:_LENGTH], "big") - len(self._head)

    def _begin(self) -> bool:
        """Take the header that is whole now; return whether such a block may follow."""
        header, self._head = self._head[_LENGTH:], b""
        try:
            found = {tag: (start, stop) for tag, start, stop in fields(header, 0, len(header))}
            kind, (size, _) = header[slice(*found[_TYPE])], found[_DATASIZE]
        except (IndexError, KeyError):  # no message of this kind
            return False
        if kind != (b"OSMData" if self.blocks else b"OSMHeader") or size > _MOST_DATA:
            return False
        self.blocks, self._left = self.blocks + 1, size
        return True

    def _wrong(self, rest: bytes) -> str:
        if self.blocks:
            return f"what it sends is no part of an OSM file any more after {self._start} bytes"
        page = (self._head + rest).lstrip()[:1] == b"<"
        return "an HTML page instead of an extract" if page else _NO_EXTRACT
