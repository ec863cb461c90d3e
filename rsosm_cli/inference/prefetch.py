"""Reading ahead: the next windows are cut in a thread while the model works on the last ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Says that the producer has stopped, and with what error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(make: Callable[[], Iterator[T]], depth: int = 2) -> Iterator[T]:
    """Yield the items of ``make()``, run in a thread at most ``depth`` items ahead; its errors are raised here."""
    items: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        error: BaseException | None = None
        try:
            for item in make():
                if not put(item):
                    break
        except BaseException as raised:  # noqa: BLE001 - handed to the consumer, which raises it
            error = raised
        put(_End(error))

    thread = threading.Thread(target=produce, name="rsosm-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()
