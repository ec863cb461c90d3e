"""Memory of batches that are gone, used again for the next ones.

Fresh memory is cleared by the system, page by page, when it is first written: of a batch of crowded tiles that takes
twice the time of writing the vectors themselves.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

# Smaller pieces the C library itself keeps and hands out again; from this size on numpy asks for large pages.
LARGE_BYTES = 1 << 22
# Idle pieces of one size: the batch before is still in use while one is made, so two take turns.
_KEPT = 2

_idle: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)


def room(n_bytes: int) -> NDArray[np.uint8]:
    """Return (n_bytes,) with whatever lies there; when nothing holds it or a view of it, it is handed out again."""
    if n_bytes < LARGE_BYTES:
        return np.empty(n_bytes, np.uint8)
    size = (n_bytes - 1).bit_length()  # pages that are never written take no memory
    try:
        memory = _idle[size].pop()
    except IndexError:
        memory = np.empty(1 << size, np.uint8)
    # Views of an array that lies in another's memory hold the other one; of a buffer, they hold the array itself.
    piece = np.frombuffer(memory.data, np.uint8, n_bytes)
    weakref.finalize(piece, _keep, size, memory).atexit = False
    return piece


def _keep(size: int, memory: NDArray[np.uint8]) -> None:
    if len(_idle[size]) < _KEPT:
        _idle[size].append(memory)
