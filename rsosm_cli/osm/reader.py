"""libosmium's reader as a program needs it that can be interrupted: it tells that it goes on, and it stops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rsosm_cli.progress import Advance

if TYPE_CHECKING:
    import osmium

# How files of each form begin, with libosmium's name of it. XML may begin with a mark of its encoding.
_BEGINNINGS = ((b"\x1f\x8b", "osm.gz"), (b"BZh", "osm.bz2"), (b"\xff\xe0", "o5m"))
_HEADER_BLOCK = b"OSMHeader"  # in PBF after the length of the first block, two bytes of field and length before it
_DESCRIPTORS = Path("/proc/self/fd")
_TICK = 1_000  # calls, after each of which progress is shown
_REST = 4  # times that it is shown, after each of which there is a rest


class Ticker:
    """Called with some objects while libosmium streams a file: lets an interruption through, and shows that it goes on.

    libosmium keeps Python waiting for the whole of a pass. Being called with every way would take a tenth of its time.
    ``rest`` is called now and then.
    """

    KEYS = ("ref", "place")  # a few in a hundred objects of any country have one of these

    def __init__(self, advance: Advance, rest: Callable[[], None]) -> None:
        self.advance = advance
        self.rest = rest
        self.waiting = 0
        self.shown = 0
        self._until_rest = _REST

    def node(self, _: object) -> None:
        self.waiting += 1
        if self.waiting == _TICK:
            self.advance(self.waiting)
            self._until_rest -= 1
            if not self._until_rest:
                self._until_rest = _REST
                self.rest()
            self.shown, self.waiting = self.shown + self.waiting, 0

    way = node

    def count(self, objects: int) -> None:
        """Show ``objects`` as read, but for what was shown of them before."""
        before = min(objects, self.shown)
        self.shown -= before
        self.advance(objects - before)


def osm_file(path: Path) -> osmium.io.File:
    """Return a file for libosmium, which goes by endings alone, by what its first bytes say: endings are changed.

    A file that begins like none of them goes by its ending. Raises :class:`OSError`.
    """
    import osmium

    with path.open("rb") as file:
        head = file.read(64)
    form = next((name for begin, name in _BEGINNINGS if head.startswith(begin)), "")
    if not form and head[6:15] == _HEADER_BLOCK:
        form = "pbf"
    elif not form and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        form = "osm"
    return osmium.io.File(str(path), form) if form else osmium.io.File(str(path))


@contextmanager
def open_reader(path: Path, kinds: osmium.osm.osm_entity_bits | None = None) -> Iterator[osmium.io.Reader]:
    """Yield a reader of the ``kinds`` of objects of a file (None: of all), which ends at once when interrupted."""
    import osmium

    before = _opened(path)
    with osmium.io.Reader(osm_file(path), osmium.osm.ALL if kinds is None else kinds) as reader:
        try:
            yield reader
        except BaseException:
            # Its threads read and decode the file to the end before they leave, minutes of a country's.
            # So the file ends here: what is left of it is read from the empty device.
            with open(os.devnull, "rb") as empty:
                for descriptor in _opened(path) - before:
                    os.dup2(empty.fileno(), descriptor, inheritable=False)
            raise


def _opened(path: Path) -> set[int]:
    """Return the descriptors under which this process has a file open; none where the system does not tell."""
    found = set()
    if _DESCRIPTORS.is_dir():
        wanted = path.stat()
        for entry in _DESCRIPTORS.iterdir():
            try:
                same = os.path.samestat(os.stat(entry), wanted)
            except OSError:  # closed in between
                continue
            if same:
                found.add(int(entry.name))
    return found
