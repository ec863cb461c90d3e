"""A thread beside the caller's: what libraries do without Python, as writing and decoding, takes no time then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Beside:
    """Context manager that does one thing at a time beside its caller."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._doing: Future[Any] | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def do(self, work: Callable[..., object], *what: object) -> None:
        """Begin with ``work`` when what it did before is done; raises what that raised."""
        self.wait()
        self._doing = self._thread.submit(work, *what)

    def wait(self) -> Any:
        """Return what was done when it is done."""
        doing, self._doing = self._doing, None
        return None if doing is None else doing.result()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield ``items``, the next one made while the caller works with one."""
    with Beside() as beside:
        beside.do(next, items, None)
        while (item := beside.wait()) is not None:
            beside.do(next, items, None)
            yield item
