"""How much this machine asks of one server, whatever the number of processes: files that the system unlocks after each.

A killed process keeps nothing: its locks end with it, and the turns that it had taken pass by themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rsosm_cli.errors import DiskError

_FAR_S = 600.0  # a turn that is further away was left by another clock
_POLL_S = 0.02  # to look for a place at a server; a request takes some 0.1 s


def gate_file(server: str, ending: str) -> Path:
    """Return the file, which is there, by which the processes of this machine agree on a server.

    All users share a folder. Where the system keeps a file that another user made there from this one (Linux does with
    ``fs.protected_regular``), the processes of this user agree in a folder of their own.
    """
    name = f"{hashlib.sha256(server.encode()).hexdigest()[:16]}.{ending}"
    shared = Path(tempfile.gettempdir()) / "rsosm-gates"
    for folder, mode in ((shared, 0o1777), (shared.with_name(f"{shared.name}-{_user()}"), 0o700)):
        with contextlib.suppress(PermissionError, FileExistsError, NotADirectoryError):
            folder.mkdir(exist_ok=True)
            with contextlib.suppress(PermissionError):  # made by another user, who did the same
                folder.chmod(mode)
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                with contextlib.suppress(PermissionError):  # likewise, whatever this user's umask
                    (folder / name).chmod(0o666)
            finally:
                os.close(file)
            return folder / name
    raise DiskError(f"In {shared.parent} no file can be made.", hint="Set TMPDIR to a folder that you may write to.")


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


class Turns:
    """Turns at a server: ``rate`` requests a second and ``places`` at a time, for all processes together.

    Where processes have other limits, each keeps its own.
    """

    def __init__(self, server: str, rate: float, places: int) -> None:
        self.server, self.rate, self.places = server, rate, places
        self._book, self._lock = gate_file(server, "turns"), gate_file(server, "turns.lock")

    def next_s(self) -> float:
        """Take the next turn; return the seconds until it comes."""
        from filelock import FileLock

        with FileLock(self._lock, mode=0o666):
            now = time.time()  # of all processes one; a clock that is set back costs _FAR_S at most
            turn = max(now, self._read(now))
            self._write(turn + 1 / self.rate)
        return turn - now

    @contextlib.contextmanager
    def place(self, pause: Callable[[float], None]) -> Iterator[None]:
        """Hold one of the places; ``pause`` waits between two looks for one."""
        from filelock import FileLock, Timeout

        while True:
            for number in range(self.places):
                lock = FileLock(gate_file(self.server, f"{number}.place"), mode=0o666)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                try:
                    yield
                finally:
                    lock.release()
                return
            pause(_POLL_S)

    def _read(self, now: float) -> float:
        try:
            turn = float(self._book.read_text())
        except (
            FileNotFoundError,
            ValueError,
        ):  # the first one (it is empty), or half written by a process that was killed
            return now
        return turn if turn - now <= _FAR_S else now

    def _write(self, turn: float) -> None:
        self._book.write_text(repr(turn))
