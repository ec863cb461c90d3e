"""What spawned processes say, shown by the process that the user started: progress, log records, errors."""

from __future__ import annotations

import logging
import logging.handlers
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rsosm_cli.errors import RsosmError
from rsosm_cli.progress import Advance, Progress

_LOGGER = "rsosm"


class Relay:
    """The spawned side: a :class:`~rsosm_cli.progress.Progress` that sends what it is told. Picklable to a child."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    @contextmanager
    def task(self, label: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        self.queue.put(("task", (label, total, unit)))

        def advance(units: float = 1, /) -> None:
            self.queue.put(("advance", units))

        yield advance
        self.queue.put(("end", None))

    @contextmanager
    def attached(self, *, speaks: bool) -> Iterator[None]:
        """Send this process's log records where it ``speaks`` (one rank does), and an error of ours in any case."""
        logger = logging.getLogger(_LOGGER)
        handler = _Sender(self.queue)
        logger.setLevel(logging.INFO if speaks else logging.CRITICAL)
        logger.addHandler(handler)
        try:
            yield
        except RsosmError as error:
            self.queue.put(("error", error))
            raise
        finally:
            logger.removeHandler(handler)


class _Sender(logging.handlers.QueueHandler):
    """Labels log records on their way into the queue."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.put_nowait(("log", record))


class Listener:
    """The user's side: one thread that shows what comes."""

    def __init__(self, queue: Any, progress: Progress) -> None:
        self.queue = queue
        self.progress = progress
        self.error: RsosmError | None = None
        self.result: Any = None
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.queue.put(("stop", None))
        self._thread.join()

    def _listen(self) -> None:
        logger = logging.getLogger(_LOGGER)
        with ExitStack() as stack:
            advance: Advance | None = None
            while (message := self.queue.get())[0] != "stop":
                kind, content = message
                if kind == "task":
                    stack.close()
                    advance = stack.enter_context(self.progress.task(*content))
                elif kind == "advance" and advance is not None:
                    advance(content)
                elif kind == "end":
                    stack.close()
                    advance = None
                elif kind == "log" and logger.isEnabledFor(content.levelno):
                    logger.handle(content)
                elif kind == "result":
                    self.result = content
                elif kind == "error":
                    self.error = self.error or content
