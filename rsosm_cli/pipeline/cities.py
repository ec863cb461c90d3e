"""Many cities, one after the other or in several processes, past those that fail."""

from __future__ import annotations

import logging
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rsosm_cli.errors import RsosmError, UsageError, explain, printable
from rsosm_cli.pipeline.result import Result
from rsosm_cli.progress import SILENT, Progress

log = logging.getLogger("rsosm")


def city_names(cities: Sequence[str] = (), file: Path | None = None) -> list[str]:
    """Return the names given and those of a file (one a line, ``#`` starts a comment, ``-`` is standard input).

    A name given twice is kept once. Raises :class:`UsageError` where the file is missing, empty or not text.
    """
    names = list(cities)
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8-sig")
        except OSError as error:
            reason = error.strerror.lower() if error.strerror else str(error)
            raise UsageError(f"The list of cities {file} cannot be read: {reason}.") from None
        except UnicodeDecodeError:
            raise UsageError(
                f"The list of cities {file} is not text in UTF-8.", hint="Save it so: UTF-8, one name a line."
            ) from None
        listed = [line.split("#", 1)[0].strip() for line in text.splitlines()]
        if not any(listed):
            raise UsageError(f"The list of cities {file} is empty.", hint="Write one name a line.")
        names += [name for name in listed if name]
    require_text(names)
    return list(dict.fromkeys(names))


def require_text(names: Sequence[str], of: str = "city") -> None:
    """Raise :class:`UsageError` where a name (``of`` what) is not UTF-8, which no folder can be, or not of one line."""
    for name in names:
        if (shown := printable(name)) != name:
            raise UsageError(f"The name of the {of} is not UTF-8 text: {shown}.", hint="Give it in UTF-8.")
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            raise UsageError(f"The name of the {of} holds a line break or the like: {name!r}.", hint="Leave it out.")


def each_city(
    work: Callable[[str], Result],
    cities: Sequence[str],
    command: str,
    *,
    workers: int = 1,
    progress: Progress = SILENT,
) -> list[Result]:
    """Return ``work(city)`` of every city, in order; a city that fails is told at once and becomes a failed result.

    ``workers`` above 1 take cities in as many processes (``work`` must be picklable). A lone city's error is raised as
    it is. Interruptions end the loop.
    """
    if len(cities) == 1:
        return [work(cities[0])]
    with progress.task(f"{command}: cities", len(cities), "cities") as advance:
        if workers > 1:
            return _pool(work, cities, command, min(workers, len(cities)), advance)
        results = []
        for city in cities:
            results.append(attempt(work, city, command))
            advance()
        return results


def attempt(work: Callable[[str], Result], city: str, command: str) -> Result:
    """Return ``work(city)``; whatever error it raises becomes a failed result, so that others' are not lost."""
    start = time.monotonic()
    try:
        return work(city)
    except Exception as error:  # noqa: BLE001 - other cities must not suffer; told, kept in the result and the status
        return _failed(command, city, error, time.monotonic() - start)


def _failed(command: str, city: str, error: Exception, seconds: float) -> Result:
    log.debug("%s of %s failed", command, city, exc_info=error)
    status = error.exit_status if isinstance(error, RsosmError) else 1
    return Result(command, city, "failed", error=explain(error), exit_status=status, seconds=seconds)


def _pool(
    work: Callable[[str], Result], cities: Sequence[str], command: str, workers: int, advance: Callable[[float], None]
) -> list[Result]:
    import multiprocessing

    results: dict[str, Result] = {}
    start = time.monotonic()
    # Spawned: a forked child would inherit the threads and locks of libraries in use.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(attempt, work, city, command): city for city in cities}
        try:
            for future in as_completed(futures):
                city = futures[future]
                try:
                    results[city] = future.result()
                except BrokenProcessPool:
                    lost = RsosmError(
                        "A worker process was killed, most likely for want of memory.",
                        hint="Run the command again with fewer --workers: finished cities are skipped.",
                    )
                    results[city] = _failed(command, city, lost, time.monotonic() - start)
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[city] for city in cities]
