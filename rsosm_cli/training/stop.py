"""Ctrl-C in a training: the step is finished and saved before the program ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger("rsosm")

# What a terminal, torchrun and a batch system send before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the user has asked to stop; a second Ctrl-C stops at once, unless ``patient``.

    ``forward``: the processes that this one has started are told, too; a second Ctrl-C kills them.
    """

    def __init__(self, *, patient: bool = False, forward: bool = False) -> None:
        self.asked = False
        self.patient = patient
        self.forward = forward

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to signals; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        children = multiprocessing.active_children() if self.forward else []
        if self.asked and not self.patient:
            for child in children:
                child.kill()
            raise KeyboardInterrupt
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, signal.SIGINT)
        if not self.asked and not self.forward:
            log.warning("Stopping after this step; its state is saved.")
        self.asked = True
