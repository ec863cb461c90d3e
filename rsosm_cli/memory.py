"""Giving back the memory that libraries keep for later, which adds up over a large file or the blocks of a city."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4  # MADV_DONTNEED of Linux
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LITTLE = (16 << 20, 2 << 20)  # bytes of each: less costs time
_MUCH = (32 << 20, 128 << 20)


@cache
def _c_library() -> ctypes.CDLL | None:
    if sys.platform == "linux":
        with suppress(OSError):
            return ctypes.CDLL(None)  # the C library in use, whichever it is
    return None


def keep_little() -> None:
    """Let the C library return large pieces of memory to the system at once, from now on.

    By itself it learns from what is freed to keep larger and larger ones, until they lie all over its memory.
    """
    _set_malloc(*_LITTLE)


def keep_much() -> None:
    """Let the C library keep what is freed, from now on: pages that are soon needed again need not be made again.

    By itself it gives tens of megabytes back several times in the reading of a small file, or not at all, by how
    things happen to lie.
    """
    _set_malloc(*_MUCH)


def _set_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    with suppress(AttributeError):  # no C library of GNU
        if (library := _c_library()) is not None:
            library.mallopt(_MMAP_THRESHOLD, mmap_threshold)
            library.mallopt(_TRIM_THRESHOLD, trim_threshold)


def give_back() -> None:
    """Return memory to the system that is not used any more, which the C library keeps for later: it adds up."""
    with suppress(AttributeError):  # no C library of GNU
        if (library := _c_library()) is not None:
            library.malloc_trim(0)


def let_go(folder: Path) -> None:
    """Take the pages of the files in ``folder`` that are mapped into memory out of it.

    They stay in the files and come back when they are asked for. The system would take them only when it runs out of
    memory; until then they count as the process's, and a batch system may end it for them.
    """
    library = _c_library()
    if library is None or not _MAPS.is_file():
        return
    beginning = f"{folder.resolve()}/"
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        if beginning not in line:
            continue
        span, mode, *_, name = line.split(maxsplit=5)
        # Of a private mapping that can be written to, pages are no longer the file's.
        if name.startswith(beginning) and (mode[3] == "s" or mode[1] == "-"):
            start, end = (int(address, 16) for address in span.split("-"))
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


@contextmanager
def arrow_keeps_nothing() -> Iterator[None]:
    """Let Arrow take its memory from the system: its own pool keeps what is freed, and is no faster here.

    It is one setting of the process: of two uses at a time the later may leave it set, which changes no result.
    """
    import pyarrow as pa

    usual = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(usual)
