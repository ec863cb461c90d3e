"""Memory of batches that are gone, used again for the next ones.

Fresh memory is cleared by the system, page by page, when it is first written: of a batch of crowded tiles that takes
twice the time of writing the vectors themselves.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

# Smaller pieces the C library itself keeps and hands out again; from this size on numpy asks for large pages.
LARGE_BYTES = 1 << 22
# Idle pieces in all. A batch takes four (a node type each, and the edges), and while it is in use the next one is made.
_KEPT = 8

# By size, the size that was last used last. Every step on it is one operation of the interpreter: finalizers run in any
# thread, also in the midst of another one, where a lock would wait for itself.
_idle: OrderedDict[int, list[NDArray[np.uint8]]] = OrderedDict()


def room(n_bytes: int) -> NDArray[np.uint8]:
    """Return (n_bytes,) with whatever lies there; when nothing holds it or a view of it, it is handed out again."""
    if n_bytes < LARGE_BYTES:
        return np.empty(n_bytes, np.uint8)
    size = (n_bytes - 1).bit_length()  # Linux gives no memory to pages that are never written
    try:
        memory = _idle[size].pop()
    except (KeyError, IndexError):
        memory = np.empty(1 << size, np.uint8)
    # Views of an array that lies in another's memory hold the other one; of a buffer, they hold the array itself.
    piece = np.frombuffer(memory.data, np.uint8, n_bytes)
    weakref.finalize(piece, _keep, size, memory).atexit = False
    return piece


def _keep(size: int, memory: NDArray[np.uint8]) -> None:
    _idle.setdefault(size, []).append(memory)
    with suppress(KeyError):
        _idle.move_to_end(size)
    for other in list(_idle):
        while sum(len(pieces) for pieces in list(_idle.values())) > _KEPT:
            try:
                _idle[other].pop()
            except (KeyError, IndexError):
                break


def release() -> None:
    """Let go of all idle pieces, where other work comes."""
    _idle.clear()
