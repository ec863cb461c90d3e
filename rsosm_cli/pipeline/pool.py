"""Many pieces of CPU work: in this process, in a process pool, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from rsosm_cli.errors import RsosmError, SourceError, UsageError

J = TypeVar("J")
R = TypeVar("R")

# Work handed out at a time, a worker: enough that none waits, few enough that an interruption is quick.
_AHEAD = 4


def run_jobs(
    work: Callable[[J], R], jobs: Sequence[J], *, workers: int = 1, scheduler: str | None = None
) -> Iterator[R]:
    """Yield ``work(job)`` of every job as it is finished, in any order.

    ``scheduler``: address of a Dask scheduler whose workers see the same files. The first error ends it, and what has
    not begun is cancelled. ``work`` and the jobs must be picklable unless one worker does all in this process.
    """
    if scheduler is None and (workers <= 1 or len(jobs) <= 1):
        yield from map(work, jobs)
        return
    with _executor(min(workers, len(jobs)), scheduler) as (executor, width):
        interruptible = partial(_work, work) if scheduler is None else work
        waiting = iter(jobs)
        running: set[Future[R]] = set()
        try:
            while True:
                while len(running) < width * _AHEAD and (job := next(waiting, None)) is not None:
                    with _held_back():
                        running.add(executor.submit(interruptible, job))
                if not running:
                    return
                finished = next(as_completed(running))
                running.discard(finished)
                yield finished.result()
        except BrokenProcessPool as error:
            raise RsosmError(
                "A worker process was killed, most likely for want of memory.",
                hint="Run the command again with fewer --workers: finished blocks are kept.",
            ) from error
        finally:
            for future in running:
                future.cancel()


@contextmanager
def _executor(workers: int, scheduler: str | None) -> Iterator[tuple[Executor, int]]:
    if scheduler is None:
        # Spawned: a forked child would inherit the threads and locks of libraries in use.
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawned, initializer=_listen) as pool:
            yield pool, workers
        return
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs Dask.", hint="Install it with: pip install 'rsosm[dask]'") from None
    try:
        client = Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise SourceError(
            f"The Dask scheduler {scheduler} does not answer.", hint="Check the address, or leave out --scheduler."
        ) from error
    with client:
        yield client.get_executor(), max(1, sum(client.nthreads().values()))


_working = False  # in a worker process: whether it has a job


def _listen() -> None:
    """Let Ctrl-C, which reaches all processes, end the job of a worker, and leave one without a job to the pool.

    By itself that one would die with a traceback.
    """
    signal.signal(signal.SIGINT, _interrupt)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold Ctrl-C back from this process and the worker that it may start, until that one listens."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it, multiprocessing would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(*_: Any) -> None:
    if _working:
        raise KeyboardInterrupt


def _work(work: Callable[[J], R], job: J) -> R:
    global _working
    _working = True
    try:
        return work(job)
    finally:
        _working = False
