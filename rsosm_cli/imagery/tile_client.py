"""Fetching tiles politely: a few at a time, at a bounded rate, with capped and announced waits, each kept on disk."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rsosm_cli.address import host_of
from rsosm_cli.client import Unanswered, asking, length_of, new_session, retry_after, user_agent
from rsosm_cli.errors import DiskError, SourceError
from rsosm_cli.gates import Turns
from rsosm_cli.imagery.service import TileService
from rsosm_cli.settings import FetchSettings
from rsosm_cli.units import rough
from rsosm_cli.workspace import atomic, disk_of

if TYPE_CHECKING:
    import requests

log = logging.getLogger("rsosm")
Tile = tuple[int, int, int]  # zoom, column, row

_CONNECT_S, _READ_S = 10.0, 30.0
_TILE_S = 60.0  # for a whole tile: a server that sends a byte now and then never runs into the read timeout
_LEAST_PX = 8  # a smaller picture, as one of a single clear pixel, is a service's way to say that it has no image
_TILE_BYTES = 16 * 2**20  # a 2048 px PNG; an endless body stops here
_TILE_PX = 4096  # widest tile that is decoded: beyond lie decompression bombs
_TRIES = 6
_TRIES_OF_OTHERS = 3  # where a page or the like comes in place of a tile: seldom a whim of the server
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_BUSY = {429, 500, 502, 503, 504}
_ABSENT = {204, 404, 410}
_FORBIDDEN = {401, 403}
_REFUSALS = 100  # after so many a key may have ended: a tile that was delivered is asked for again
_LOOK = "Open the address in a browser: the template, the key or the zoom may be wrong."


class _Passing(Exception):
    """A failure that another try may mend; ``wait_s`` is what the server asked for, 0: nothing."""

    tries = _TRIES

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Refused(_Passing):
    """One that seldom passes: after a few tries it is told as ``error``."""

    tries = _TRIES_OF_OTHERS

    def __init__(self, reason: str, error: SourceError) -> None:
        super().__init__(reason)
        self.error = error


class _Withheld(Exception):
    """What some services answer for a tile that they do not have, and others where something is wrong.

    A refusal is told as ``error`` where no tile is delivered; an empty answer has none.
    """

    def __init__(self, error: SourceError | None = None) -> None:
        super().__init__()
        self.error = error


class _TooLarge(ValueError):
    """A picture that is no tile."""


class Pace:
    """When the next request may go out, for all threads together, and by ``turns`` for all processes: the rate, and the
    waits that a server asks for."""

    def __init__(self, name: str, turns: Turns, max_wait_s: float) -> None:
        self.name, self.turns, self.max_wait_s = name, turns, max_wait_s
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._next = 0.0
        self._waited = 0.0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn, and hold its place at the server."""
        with self._lock:
            wait = self._next - time.monotonic()
        self.pause(wait)
        with self.turns.place(self.pause):
            self.pause(self.turns.next_s())
            yield

    def pause(self, seconds: float) -> None:
        if self.stopped.wait(max(0.0, seconds)):
            raise SourceError(f"The download from {self.name} was stopped.", hint="Run the command again to go on.")

    def answered(self) -> None:
        with self._lock:
            self._waited = 0.0

    def hold(self, seconds: float, reason: str) -> None:
        """Let no request out for ``seconds``; raises :class:`SourceError` above the longest wait allowed."""
        with self._lock:
            until = time.monotonic() + seconds
            longer = until - max(self._next, time.monotonic())
            if longer <= 0.5 * seconds:
                return  # another thread met the same refusal, and its wait is long enough
            if self._waited + longer > self.max_wait_s:
                raise SourceError(
                    f"{self.name} is not delivering ({reason}), and waiting another {rough(longer)} would exceed the "
                    f"{rough(self.max_wait_s)} allowed.",
                    hint="Run the command again later: the tiles fetched so far are kept (or raise max_wait_s).",
                )
            self._waited += longer
            self._next = until
        log.warning("%s: %s; waiting %s.", self.name, reason, rough(seconds))


class TileClient:
    """The tiles of one service and zoom, each kept as ``<cache>/<z>/<x>/<y>``: empty where the service has none.

    ``refused`` and ``empty``: tiles that it refused (status 403, S3's answer for what is not there) or sent without a
    byte, for which nothing is kept: they are missing where it delivers others.
    """

    def __init__(self, service: TileService, cache: Path, settings: FetchSettings) -> None:
        self.service = service
        self.cache = cache
        turns = Turns(host_of(service.shown), settings.xyz_rate, settings.xyz_workers)
        self.pace = Pace(service.server, turns, settings.max_wait_s)
        self.refused: set[Tile] = set()
        self.empty: set[Tile] = set()
        self._refusal: SourceError | None = None
        self._delivered: Tile | None = None
        self._absent_s = settings.xyz_missing_days * 86_400
        self._agent = user_agent(settings.contact)
        self._local = threading.local()
        self._lock = threading.Lock()

    def path(self, z: int, x: int, y: int) -> Path:
        return self.cache / str(z) / str(x) / str(y)

    def size(self, z: int, x: int, y: int) -> int:
        """Return the bytes of a tile, 0 where there is none."""
        try:
            return self.path(z, x, y).stat().st_size
        except FileNotFoundError:
            return 0

    def kept(self, z: int, x: int, y: int) -> bool:
        """Return whether a tile is kept; that the service has none is believed for a while only."""
        try:
            kept = self.path(z, x, y).stat()
        except FileNotFoundError:
            return False
        return kept.st_size > 0 or time.time() - kept.st_mtime < self._absent_s

    def fetch(self, z: int, x: int, y: int) -> bool:
        """Make sure that a tile is kept; return whether the service has it. Raises :class:`SourceError`."""
        tile = (z, x, y)
        if self.kept(*tile):
            there = self.size(*tile) > 0
            if there:
                self._delivered = tile
            return there
        try:
            data = self._patiently(tile)
        except _Withheld as answer:
            with self._lock:
                (self.empty if answer.error is None else self.refused).add(tile)
                self._refusal = answer.error or self._refusal
                doubt = answer.error is not None and len(self.refused) % _REFUSALS == 0
            if doubt:
                self.confirm()
            return False
        with self._lock:
            self.empty.discard(tile)
            self._delivered = tile if data else self._delivered
        self._keep(tile, data)
        return bool(data)

    def _keep(self, tile: Tile, data: bytes) -> None:
        try:
            with disk_of(self.cache), atomic(self.path(*tile)) as part:  # a folder needs room, too
                part.write_bytes(data)
        except DiskError as error:  # of a tile, it would name a bare number
            raise DiskError(
                f"The disk is full: the tiles of {self.service.name} were not all written to {self.cache}.",
                hint="Free some space and run the command again: the tiles fetched so far are kept.",
                path=str(self.cache),
            ) from error

    def doubtful(self, tiles: Sequence[Tile]) -> list[Tile]:
        """Return those that came as an empty answer, after a wait where there are any: they are asked for once more."""
        found = [tile for tile in tiles if tile in self.empty]
        if found:
            self.pace.hold(_FIRST_WAIT_S, "an empty answer" if len(found) == 1 else f"{len(found)} empty answers")
        return found

    def confirm(self) -> None:
        """Raise the refusal of a tile where the service refuses what it delivered before, too, or delivered nothing."""
        if self._refusal is None:
            return
        if self._delivered is None:
            raise self._refusal
        try:
            self._patiently(self._delivered)
        except _Withheld:
            raise self._refusal from None

    def _patiently(self, tile: Tile) -> bytes:
        """Return the bytes of a tile, none where the service has none, after as many tries as are due."""
        name = "/".join(map(str, tile))
        for attempt in range(_TRIES):
            try:
                with self.pace.turn():
                    data = self._request(self.service.url(*tile), name)
            except _Passing as failure:
                reason = f"{failure} for tile {name}"
                if attempt >= failure.tries - 1:
                    if isinstance(failure, _Refused):
                        raise failure.error from None
                    break
                self.pace.hold(failure.wait_s or min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S), reason)
            else:
                self.pace.answered()
                return data
        raise SourceError(
            f"{self.service.server} did not deliver in {_TRIES} tries: {reason}.",
            hint="Run the command again later: the tiles fetched so far are kept.",
        )

    def _request(self, url: str, tile: str) -> bytes:
        """Return the bytes of a tile, none where the service has none. No error of requests, which would show the
        address with its key, leaves this function."""
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = new_session(self._agent)
        try:
            with asking(url), session.get(url, timeout=(_CONNECT_S, _READ_S), stream=True) as answer:
                status, headers = answer.status_code, answer.headers
                if status in _ABSENT or headers.get("X-VE-Tile-Info") == "no-tile":
                    return b""
                if status in _BUSY:
                    raise _Passing(f"status {status}", retry_after(answer))
                if status != 200:
                    raise self._refusal_of(status, tile)
                data = self._body(answer)
        except Unanswered as error:
            if error.passes:
                raise _Passing(str(error)) from None
            raise SourceError(
                f"{self.service.server} cannot be asked for tile {tile}: {error}.", hint="Check the address."
            ) from None
        if not data:
            raise _Withheld
        side = self._side(data, tile, headers.get("Content-Type", "no type"))
        return data if side >= _LEAST_PX else b""

    def _refusal_of(self, status: int, tile: str) -> Exception:
        hint = "Is the key right, and does it allow this zoom?" if status in _FORBIDDEN else _LOOK
        error = SourceError(
            f"{self.service.server} refuses tile {tile} with status {status}.", hint=hint, status=status
        )
        if status == 403:
            return _Withheld(error)
        return _Refused(f"status {status}", error) if status == 406 else error

    def _body(self, answer: requests.Response) -> bytes:
        until = time.monotonic() + _TILE_S
        expected = length_of(answer)
        parts: list[bytes] = []
        size = 0
        while part := answer.raw.read1(65536, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > _TILE_BYTES:
                much = f"more than {_TILE_BYTES // 2**20} MiB for one tile"
                raise _Refused(much, SourceError(f"{self.service.server} sends {much}.", hint=_LOOK))
            if time.monotonic() > until:
                raise _Passing(f"not whole after {_TILE_S:.0f} s")
        if expected is not None and size < expected:
            raise _Passing("a truncated answer")
        return b"".join(parts)

    def _side(self, data: bytes, tile: str, content_type: str) -> int:
        """Return the pixels of a tile's longer side."""
        try:
            return max(decode(data).shape[1:])
        except UnidentifiedImageError:
            kind = content_type.partition(";")[0].strip()
            page = "a web page" if data.lstrip()[:1] == b"<" else "something else"
            answers = f"{self.service.server} answers tile {tile} with {page} ({kind}), not an image."
            raise _Refused(f"{page} ({kind})", SourceError(answers, hint=_LOOK)) from None
        except _TooLarge as error:
            told = f"{self.service.server} answers tile {tile} with {error}: no tile is wider than {_TILE_PX:,} pixels."
            raise _Refused(str(error), SourceError(told, hint=_LOOK)) from None
        except (OSError, SyntaxError, ValueError):
            raise _Passing("a damaged image") from None


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return a tile as (4, H, W) uint8: red, green, blue, alpha. Raises Pillow's errors."""
    with _opened(data) as image:
        if max(image.size) > _TILE_PX:
            raise _TooLarge(f"a picture of {image.size[0]:,} x {image.size[1]:,} pixels")
        return np.ascontiguousarray(np.asarray(image.convert("RGBA")).transpose(2, 0, 1))


def _opened(data: bytes) -> Image.Image:
    """Return a picture, its head alone read. Raises :class:`_TooLarge` where Pillow sees a decompression bomb."""
    with _OPENING, warnings.catch_warnings():  # filters of warnings are those of all threads
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _TooLarge("a picture of far too many pixels") from None


_OPENING = threading.Lock()
