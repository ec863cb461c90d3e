"""One polite way to ask a shared public server: one request at a time per machine, cached, with announced waits.

OSMnx asks the same servers, but on 429 and 504 it calls itself again after 55 seconds, without a bound and without a
word, for Nominatim as for Overpass (2.1: ``_overpass_request``, ``_nominatim_request``), and knows of no other process.
That is not enough for a command that must end in success or in one sentence.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urljoin, urlsplit

from rsosm_cli import __version__
from rsosm_cli.address import display, host_of, unfilled
from rsosm_cli.errors import RsosmError, SourceError
from rsosm_cli.gates import gate_file
from rsosm_cli.units import rough
from rsosm_cli.workspace import atomic, cache_folder, fingerprint

if TYPE_CHECKING:
    import requests

log = logging.getLogger("rsosm")

_RETRIED = (406, 429, 500, 502, 503, 504)
_FIRST_WAIT_S = 5.0  # without Retry-After; doubled from try to try
_TRIES = 6
_TRIES_WITHOUT_NETWORK = 3  # a cable may be put back, but nobody waits minutes for it
_TRIES_TOO_LONG = 3  # silence, an answer without end, or a drip: each try may take minutes
_NO_URL = "the address, or the one that it redirects to, is not a URL"
_UNREACHABLE = {errno.ENETUNREACH: "the network cannot be reached", errno.EHOSTUNREACH: "its host cannot be reached"}
_TIMEOUT_S = (10.0, 60.0)  # to connect; between two pieces of an answer
_SILENT_S = 10.0  # after which it is said that an answer is waited for
_PAUSE_S = 1.0  # between two requests to one server: Nominatim's usage policy allows one a second
_ANSWER_S = 900.0  # for a whole answer: a server that sends a byte now and then never runs into the read timeout
_MAX_BYTES = 256 << 20  # a document: the largest boundaries and descriptions have some ten megabytes
_REDIRECTS = 10
UNVERIFIED = "its certificate cannot be verified"
TRUST = "where a proxy has one of its own, name the file of its authority in CURL_CA_BUNDLE"
# Slower than this over a minute is a server that drips: the connection is given up.
SLOWEST_BYTES_S = 1024
SLOW_S = 60.0


@dataclass
class Client:
    """A client of one server. ``sleep`` and ``clock`` are replaced in tests."""

    name: str  # as the user knows the server: "Overpass"
    contact: str = ""
    max_wait_s: float = 300.0  # all waits of one request together
    cache: Path = field(default_factory=cache_folder)
    sleep: Callable[[float], None] = time.sleep
    timeout_s: tuple[float, float] = _TIMEOUT_S
    otherwise: str = "Or work from an extract: --osm FILE.osm.pbf"  # a hint: what does without this server
    max_bytes: int | None = None  # of an answer; default: those of a document
    secrets: Mapping[str, str] = field(default_factory=dict)  # what addresses hold of the environment, by name

    @property
    def user_agent(self) -> str:
        return user_agent(self.contact)

    def cached(self, url: str, data: Mapping[str, str], suffix: str = "") -> Path:
        """Return where the answer to a request is (or will be) kept."""
        return self.cache / "http" / f"{fingerprint(url, dict(data))}{suffix}"

    def fetch(
        self,
        url: str,
        data: Mapping[str, str],
        *,
        post: bool,
        check: Callable[[Path], str],
        fresh: bool = False,
        suffix: str = "",
        max_age_s: float = math.inf,
    ) -> Path:
        """Return a file with the server's answer, from the cache where it is there.

        ``check`` says what is wrong with an answer of status 200 ("" where nothing): servers answer with error pages
        and with halves. ``max_age_s``: an answer kept for longer is asked for again. Raises :class:`SourceError` when
        the tries or the waiting time are spent.
        """
        target = self.cached(url, data, suffix)

        def kept() -> bool:
            return not fresh and target.is_file() and time.time() - target.stat().st_mtime <= max_age_s

        if kept():
            return target
        server = host_of(unfilled(url, self.secrets))
        # One request at a time from this machine, whatever the number of processes.
        with self.gate(server):
            if kept():  # the process before us asked the same
                return target
            waited, problem = 0.0, ""
            for attempt in range(_TRIES):
                with self._waiting(server):
                    problem, pause, tries = self._ask(url, data, post, check, target)
                if not problem:
                    self._rest(server)
                    return target
                if pause is None:
                    raise self.refused(url, problem)
                if pause > self.max_wait_s:
                    problem = f"{problem}, and it asks to wait {rough(pause)}"
                pause = pause if pause > 0 else _FIRST_WAIT_S * 2**attempt
                if waited + pause > self.max_wait_s or attempt >= tries - 1:
                    break
                log.info("%s (%s): %s; next try in %s.", self.name, server, problem, rough(pause))
                self.sleep(pause)
                waited += pause
        raise self.failed(url, f"{problem.rstrip('.')}, after {counted(attempt + 1)} and {rough(waited)} of waiting")

    @contextlib.contextmanager
    def gate(self, server: str) -> Iterator[None]:
        """Hold the one place at a server that this machine takes."""
        from filelock import FileLock, Timeout

        gate = FileLock(gate_file(server, "lock"), mode=0o666)
        try:
            gate.acquire(timeout=1)
        except Timeout:
            log.info("%s (%s): waiting for another rsosm on this machine to finish its request.", self.name, server)
            gate.acquire()
        try:
            yield
        finally:
            gate.release()

    @contextlib.contextmanager
    def _waiting(self, server: str) -> Iterator[None]:
        """Say so where an answer lets one wait."""
        words = "%s (%s): waiting for its answer, up to %s of silence."
        timer = threading.Timer(_SILENT_S, log.info, (words, self.name, server, rough(self.timeout_s[1])))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _rest(self, server: str) -> None:
        if server.split(":")[0] not in ("localhost", "127.0.0.1", "[::1]"):  # a server of the user's own needs no rest
            self.sleep(_PAUSE_S)

    def failed(self, url: str, problem: str) -> SourceError:
        """Return the error for what a later try may mend."""
        url, hint = unfilled(url, self.secrets), f"Try again later, or check the address. {self.otherwise}".rstrip()
        words = f"{self.name} at {host_of(url)} gave no usable answer: {problem}."
        return SourceError(words, hint=hint, url=display(url))

    def refused(self, url: str, problem: str) -> SourceError:
        """Return the error for what stays."""
        shown, hint = display(unfilled(url, self.secrets)), f"Check the address. {self.otherwise}".rstrip()
        return SourceError(f"{self.name} has no answer at {shown}: {problem}.", hint=hint, url=shown)

    def _ask(
        self, url: str, data: Mapping[str, str], post: bool, check: Callable[[Path], str], target: Path
    ) -> _Trouble:
        """Try once, and return what went wrong: "" for nothing."""
        until = time.monotonic() + self.timeout_s[1] + _ANSWER_S
        try:
            with asking(url):
                answer = self._sent(url, data, post)
            with answer:
                if answer.status_code in _RETRIED:
                    return _Trouble(f"status {answer.status_code} {answer.reason}".strip(), retry_after(answer))
                if answer.status_code != 200:
                    return _Trouble(f"status {answer.status_code} {answer.reason}".strip(), None)
                with atomic(target) as part:
                    with asking():
                        _save(answer, part, until, self.max_bytes or _MAX_BYTES)
                    problem = check(part)
                    if problem:
                        raise _BadAnswer(problem)
                    part.chmod(0o600)  # what a server says may hold keys, as addresses signed for this user
        except _TooLong as error:
            return _Trouble(str(error), tries=_TRIES_TOO_LONG)
        except _BadAnswer as error:
            return _Trouble(str(error))
        except Unanswered as error:
            if not error.passes:
                return _Trouble(str(error), None)
            few = _TRIES_TOO_LONG if error.slow else _TRIES
            return _Trouble(str(error), tries=_TRIES_WITHOUT_NETWORK if error.offline else few)
        return _Trouble("")

    def _sent(self, url: str, data: Mapping[str, str], post: bool) -> requests.Response:
        """Return the answer to a request, its body unread. A form is sent again where a redirect leads.

        As browsers do, requests would ask there by GET, without the form.
        """
        import requests

        with new_session(self.user_agent) as session:
            session.headers["Accept-Language"] = "en"
            if not post:
                return session.get(url, params=data, timeout=self.timeout_s, stream=True)
            for _ in range(_REDIRECTS):
                answer = session.post(url, data=data, timeout=self.timeout_s, stream=True, allow_redirects=False)
                if not answer.is_redirect:
                    return answer
                answer.close()
                url = urljoin(url, answer.headers["Location"])
        raise requests.exceptions.TooManyRedirects


class _Trouble(NamedTuple):
    """What went wrong ("": nothing); ``pause``: seconds, 0 for the default, None: not again; ``tries`` in all."""

    words: str
    pause: float | None = 0.0
    tries: int = _TRIES


class _BadAnswer(Exception):
    """An answer of status 200 that is not what was asked for."""


class _TooLong(_BadAnswer):
    """One that does not end, or not in time."""


class Unanswered(Exception):
    """A request that brought no answer, in plain words and without its address, which may hold a key.

    ``passes``: another try may mend it; ``offline``: the network itself, and not the server, is what lacks; ``slow``:
    it took all the time that it was given.
    """

    def __init__(self, words: str, *, passes: bool = True, offline: bool = False, slow: bool = False) -> None:
        super().__init__(words)
        self.passes, self.offline, self.slow = passes, offline, slow


@contextlib.contextmanager
def asking(url: str = "") -> Iterator[None]:
    """Turn what requests and urllib3 raise, while a request is sent and its body read, into :class:`Unanswered`.

    ``url``: the address asked, so that another host is named where a redirect leads to one that cannot be reached.
    """
    import requests
    import urllib3

    try:
        yield
    except RsosmError:  # some are ValueErrors
        raise
    except requests.exceptions.InvalidURL:
        raise Unanswered(_NO_URL, passes=False) from None
    except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise Unanswered(f"{_led_on(url, error)}no answer in time", slow=True) from None
    except requests.exceptions.TooManyRedirects:
        raise Unanswered("it redirects in a circle", passes=False) from None
    except (
        requests.exceptions.ConnectionError,
        requests.exceptions.ChunkedEncodingError,
        urllib3.exceptions.HTTPError,
    ) as error:
        passes = not any(isinstance(part, ssl.SSLCertVerificationError) for part in _chain(error))
        words = f"{_led_on(url, error)}{trouble_of(error)}"
        raise Unanswered(words, passes=passes, offline=_is_offline(error)) from None
    except requests.exceptions.RequestException:
        raise Unanswered("the address cannot be asked", passes=False) from None
    except ValueError:  # of http://[::1 as the target of a redirect, or of a target whose bytes are no UTF-8
        raise Unanswered(_NO_URL, passes=False) from None


def _led_on(asked: str, error: BaseException) -> str:
    """Return the beginning of a sentence on an error of another host than the one asked: "it redirects to it, and"."""
    import requests

    request = getattr(error, "request", None)
    if not asked or request is None:
        return ""
    # As requests writes addresses: names of hosts in ASCII, and in lower case.
    before, after = (urlsplit(str(url)) for url in (requests.Request("GET", asked).prepare().url, request.url))
    if (before.scheme, before.hostname, before.port) == (after.scheme, after.hostname, after.port):
        return ""
    return f"it redirects to {after.scheme}://{host_of(after.geturl())}, and "


class Pace:
    """How quickly an answer comes: a server that drips would go on for hours, and never be silent for long."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def too_slow(self, count: int) -> float | None:
        """Take note of ``count`` bytes; return the bytes a second of the last minute where they are too few."""
        self.bytes += count
        passed = time.monotonic() - self.since
        if passed <= SLOW_S:
            return None
        speed = self.bytes / passed
        self.since, self.bytes = time.monotonic(), 0
        return speed if speed < SLOWEST_BYTES_S else None


def new_session(agent: str) -> requests.Session:
    """Return a session that leaves no connection open where a redirect leads to what is no address."""
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            try:
                target = super().get_redirect_target(resp)
                urlsplit(target or "")
            except ValueError:
                resp.close()
                raise
            return target

    session = Session()
    session.headers["User-Agent"] = agent
    session.max_redirects = _REDIRECTS
    return session


def user_agent(contact: str) -> str:
    """Return how a request says who asks; of a contact what headers can hold."""
    contact = re.sub(r"[^\x20-\x7e]", "", contact).strip()
    return f"rsosm/{__version__} ({contact or 'https://pypi.org/project/rsosm'})"


def counted(tries: int) -> str:
    return f"{tries} tries" if tries > 1 else "one try"


def _save(answer: requests.Response, part: Path, until: float, limit: int) -> None:
    size, expected, pace = 0, length_of(answer), Pace()
    with part.open("wb") as file:
        while piece := answer.raw.read1(1 << 16, decode_content=True):
            size += len(piece)
            if size > limit:
                raise _TooLong(f"the answer is larger than {limit >> 20:,} MB")
            if time.monotonic() > until:
                raise _TooLong("the answer was not whole in time")
            if (slow := pace.too_slow(len(piece))) is not None:
                raise _TooLong(f"it sends only {slow:.0f} bytes a second")
            file.write(piece)
    if expected is not None and size < expected:
        raise _BadAnswer(f"the answer broke off after {size} of {expected} bytes")


def length_of(answer: requests.Response) -> int | None:
    """Return the bytes that an answer announces; None: it does not say, or packs them, which counts others."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        return None
    text = answer.headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def retry_after(answer: requests.Response) -> float:
    """Return the seconds that the server asks to wait, 0 where it does not say."""
    text = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        when = email.utils.parsedate_to_datetime(text)
        return max(0.0, when.timestamp() - time.time())
    return 0.0


def trouble_of(error: BaseException) -> str:
    """Return what a chain of network errors comes down to, in plain words and without the address."""
    chain = _chain(error)
    for kind, words in (
        (socket.gaierror, "the name of its host is not known here (is there a network?)"),
        (ssl.SSLCertVerificationError, f"{UNVERIFIED} ({TRUST})"),
        (ssl.SSLError, "no encrypted connection can be made"),
        (ConnectionRefusedError, "nobody answers at that address (connection refused)"),
        (TimeoutError, "no answer in time"),
    ):
        if any(isinstance(part, kind) for part in chain):
            return words
    if any(type(part).__name__ == "ProxyError" for part in chain):
        return "the proxy does not answer"
    known = [_UNREACHABLE[part.errno] for part in chain if isinstance(part, OSError) and part.errno in _UNREACHABLE]
    return known[0] if known else "the connection broke"


def authorities() -> str | None:
    """Return the file of authorities that the environment names, in the order in which requests looks for it."""
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")


def _is_offline(error: BaseException) -> bool:
    return any(
        isinstance(part, socket.gaierror) or (isinstance(part, OSError) and part.errno in _UNREACHABLE)
        for part in _chain(error)
    )


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and those below it."""
    chain: list[BaseException] = []
    todo: list[BaseException] = [error]
    while todo and len(chain) < 20:
        found = todo.pop()
        chain.append(found)
        # urllib3 keeps the error below in `reason` or among its arguments.
        inner = [getattr(found, "reason", None), found.__cause__, found.__context__, *found.args]
        todo += [part for part in inner if isinstance(part, BaseException) and part not in chain]
    return chain
