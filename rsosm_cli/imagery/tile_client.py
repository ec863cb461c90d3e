"""Fetching tiles politely: a few at a time, at a bounded rate, with capped and announced waits, each kept on disk."""

from __future__ import annotations

import io
import logging
import threading
import time
import warnings
from email.utils import parsedate_to_datetime
from pathlib import Path

import numpy as np
import requests
import urllib3
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rsosm_cli import __version__
from rsosm_cli.client import TRUST, UNVERIFIED, is_unverified, trouble_of
from rsosm_cli.errors import SourceError
from rsosm_cli.imagery.service import TileService
from rsosm_cli.settings import FetchSettings
from rsosm_cli.workspace import atomic

log = logging.getLogger("rsosm")

_CONNECT_S, _READ_S = 10.0, 30.0
_TILE_S = 60.0  # for a whole tile: a server that sends a byte now and then never runs into the read timeout
_TILE_BYTES = 16 * 2**20  # a 2048 px PNG; an endless body stops here
_TILE_PX = 4096  # widest tile that is decoded: beyond lie decompression bombs
_TRIES = 6
_TRIES_OF_OTHERS = 3  # where a page or the like comes in place of a tile: seldom a whim of the server
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_BUSY = {429, 500, 502, 503, 504}
_ABSENT = {204, 404, 410}
_LOOK = "Open the address in a browser: the template, the key or the zoom may be wrong."


class _Passing(Exception):
    """A failure that another try may mend; ``wait_s`` is what the server asked for."""

    tries = _TRIES

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Refused(_Passing):
    """One that seldom passes: after a few tries it is told as ``error``."""

    tries = _TRIES_OF_OTHERS

    def __init__(self, reason: str, error: SourceError) -> None:
        super().__init__(reason)
        self.error = error


class Pace:
    """When the next request may go out, for all threads together: the rate, and the waits that a server asks for."""

    def __init__(self, name: str, rate: float, max_wait_s: float) -> None:
        self.name, self.rate, self.max_wait_s = name, rate, max_wait_s
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._next = 0.0
        self._waited = 0.0

    def turn(self) -> None:
        """Wait for this thread's turn."""
        with self._lock:
            at = max(self._next, time.monotonic())
            self._next = at + 1 / self.rate
        self.pause(at - time.monotonic())

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
                    f"{self.name} is not delivering ({reason}), and waiting another {longer:.0f} s would exceed the "
                    f"{self.max_wait_s:.0f} s allowed.",
                    hint="Run the command again later: the tiles fetched so far are kept (or raise max_wait_s).",
                )
            self._waited += longer
            self._next = until
        log.warning("%s: %s; waiting %.0f s.", self.name, reason, seconds)


class TileClient:
    """The tiles of one service and zoom, each kept as ``<cache>/<z>/<x>/<y>``: empty where the service has none."""

    def __init__(self, service: TileService, cache: Path, settings: FetchSettings) -> None:
        self.service = service
        self.cache = cache
        self.pace = Pace(service.server, settings.xyz_rate, settings.max_wait_s)
        self._absent_s = settings.xyz_missing_days * 86_400
        contact = f" ({settings.contact})" if settings.contact else ""
        self._agent = f"rsosm/{__version__}{contact}"
        self._local = threading.local()

    def path(self, z: int, x: int, y: int) -> Path:
        return self.cache / str(z) / str(x) / str(y)

    def kept(self, z: int, x: int, y: int) -> bool:
        """Return whether a tile is kept; that the service has none is believed for a while only."""
        try:
            kept = self.path(z, x, y).stat()
        except FileNotFoundError:
            return False
        return kept.st_size > 0 or time.time() - kept.st_mtime < self._absent_s

    def fetch(self, z: int, x: int, y: int) -> bool:
        """Make sure that a tile is kept; return whether the service has it. Raises :class:`SourceError`."""
        path = self.path(z, x, y)
        if self.kept(z, x, y):
            return path.stat().st_size > 0
        tile = f"{z}/{x}/{y}"
        for attempt in range(_TRIES):
            self.pace.turn()
            try:
                data = self._request(self.service.url(z, x, y), tile)
            except _Passing as failure:
                reason = f"{failure} for tile {tile}"
                if attempt >= failure.tries - 1:
                    if isinstance(failure, _Refused):
                        raise failure.error from None
                    break
                wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) if failure.wait_s is None else failure.wait_s
                self.pace.hold(wait, reason)
            else:
                self.pace.answered()
                with atomic(path) as part:
                    part.write_bytes(data)
                return bool(data)
        raise SourceError(
            f"{self.service.server} did not deliver in {_TRIES} tries: {reason}.",
            hint="Run the command again later: the tiles fetched so far are kept.",
        )

    def _request(self, url: str, tile: str) -> bytes:
        """Return the bytes of a tile, none where the service has none. No error of requests, which would show the
        address with its key, leaves this function."""
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.headers["User-Agent"] = self._agent
            session.max_redirects = 5
        try:
            with session.get(url, timeout=(_CONNECT_S, _READ_S), stream=True) as answer:
                status, headers = answer.status_code, answer.headers
                if status in _ABSENT or headers.get("X-VE-Tile-Info") == "no-tile":
                    return b""
                if status in _BUSY:
                    raise _Passing(f"status {status}", _retry_after(headers.get("Retry-After")))
                if status != 200:
                    key = "Is the key right, and does it allow this zoom?"
                    hint = key if status in (401, 403) else _LOOK
                    refusal = f"{self.service.server} refuses tile {tile} with status {status}."
                    error = SourceError(refusal, hint=hint, status=status)
                    raise _Refused(f"status {status}", error) if status == 406 else error
                data = self._body(answer)
        except requests.TooManyRedirects:
            raise SourceError(f"{self.service.server} redirects tile {tile} in a circle.", hint=_LOOK) from None
        except requests.Timeout:
            raise _Passing("no answer in time") from None
        except (
            requests.ConnectionError,
            requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError,
        ) as error:
            if is_unverified(error):
                told = f"{self.service.server} cannot be asked for tile {tile}: {UNVERIFIED}."
                raise SourceError(told, hint=f"{TRUST[0].upper()}{TRUST[1:]}.") from None
            raise _Passing(trouble_of(error)) from None
        except requests.RequestException:
            raise SourceError(
                f"{self.service.server} cannot be asked for tile {tile}.", hint="Check the address: is it a URL?"
            ) from None
        if data:
            self._check(data, tile, headers.get("Content-Type", "no type"))
        return data

    def _body(self, answer: requests.Response) -> bytes:
        until = time.monotonic() + _TILE_S
        expected = answer.headers.get("Content-Length")
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
        if expected and expected.isdigit() and "Content-Encoding" not in answer.headers and size < int(expected):
            raise _Passing("a truncated answer")
        return b"".join(parts)

    def _check(self, data: bytes, tile: str, content_type: str) -> None:
        try:
            decode(data)
        except UnidentifiedImageError:
            kind = content_type.partition(";")[0].strip()
            page = "a web page" if data.lstrip()[:1] == b"<" else "something else"
            answers = f"{self.service.server} answers tile {tile} with {page} ({kind}), not an image."
            raise _Refused(f"{page} ({kind})", SourceError(answers, hint=_LOOK)) from None
        except (OSError, SyntaxError, ValueError):
            raise _Passing("a damaged image") from None


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return a tile as (4, H, W) uint8: red, green, blue, alpha. Raises Pillow's errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked here
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > _TILE_PX:
                raise ValueError(f"a tile of {image.size[0]} x {image.size[1]} pixels")
            return np.ascontiguousarray(np.asarray(image.convert("RGBA")).transpose(2, 0, 1))


def _retry_after(text: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number or a date."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
