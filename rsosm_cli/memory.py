"""Giving back the memory that libraries keep for later, which adds up over a large file or the blocks of a city."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

_MMAP_THRESHOLD, _LARGE_PIECE = -3, 16 << 20  # M_MMAP_THRESHOLD of malloc.h; bytes: less costs time


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
    with suppress(AttributeError):  # no C library of GNU
        if (library := _c_library()) is not None:
            library.mallopt(_MMAP_THRESHOLD, _LARGE_PIECE)


def give_back() -> None:
    """Return memory to the system that is not used any more, which the C library keeps for later: it adds up."""
    with suppress(AttributeError):  # no C library of GNU
        if (library := _c_library()) is not None:
            library.malloc_trim(0)


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
