"""An extract from a server: resumed where a run broke off, whole and verified, or not at all.

The part lies beside the target with a note of what it is a part of (length, validator, checksum). A later run asks for
the rest by ``Range`` under ``If-Range``, so that a file that changed meanwhile comes whole instead. What arrives is
followed block by block: what is no extract, or one again and again without an end, is told early.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rsosm_cli.address import host_of
from rsosm_cli.client import Client, Pace, Unanswered, asking, counted, length_of, new_session, retry_after
from rsosm_cli.errors import DiskError, SourceError
from rsosm_cli.osm.framing import Framing
from rsosm_cli.progress import SILENT, Advance, Progress
from rsosm_cli.units import rough, size
from rsosm_cli.workspace import disk_of, require_space, write_json

if TYPE_CHECKING:
    import requests

log = logging.getLogger("rsosm")
T = TypeVar("T")

_RETRIED = (406, 408, 429, 500, 502, 503, 504)
_NO_HEAD = (405, 501)  # of servers that answer GET alone
_TRIES = 6  # without a megabyte of progress in between
_TRIES_OF_OTHERS = 3  # where another file comes than the one announced
_FIRST_WAIT_S = 5.0
_PROGRESS_BYTES = 1 << 20
_READ_S = 60.0
_HEAD = 64  # bytes that tell an extract from a page
_MOST_BYTES = 200 << 30  # the planet has about 90 GB
# Of a file whose length nobody tells the disk is looked at after so many bytes, and is left so much.
_LOOK_BYTES, _SPARE_BYTES = 64 << 20, 256 << 20


@dataclass(frozen=True)
class Remote:
    """A file on a server: its length (0: not said) and the validator that changes with it."""

    url: str
    size: int
    validator: str
    md5: str = ""


class _Stop(Exception):
    """What another try would not mend."""


class _Again(Exception):
    """What another try may mend; ``wait_s`` as the server asks for, 0: not said."""

    def __init__(self, reason: str, wait_s: float = 0.0, tries: int | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.tries = _TRIES if tries is None else tries


def ask_size(client: Client, url: str) -> Remote:
    """Return length and validator of a remote file by HEAD. Raises :class:`SourceError`."""
    return _patiently(client, url, lambda: _head(client, url), lambda: 0)


def download_file(client: Client, remote: Remote, target: Path, *, progress: Progress = SILENT) -> None:
    """Download ``remote``, a PBF file, to ``target``; what an earlier run left of the same file is kept.

    The caller holds a lock of the target. Raises :class:`SourceError` (no delivery, no PBF file, other bytes than the
    checksum says), :class:`DiskError`.
    """
    part, note = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _same(note, remote):
        part.unlink(missing_ok=True)
        write_json(note, asdict(remote))
    try:
        _download(client, remote, target, part, progress)
    except BaseException:
        if not (_length(part) and remote.validator):  # nothing that a later run could ask for the rest of
            part.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise
    part.replace(target)
    note.unlink(missing_ok=True)


def _download(client: Client, remote: Remote, target: Path, part: Path, progress: Progress) -> None:
    """Make ``part`` whole and of the checksum that the server tells."""
    require_space(target.parent, remote.size - _length(part), f"{target.name} ({size(remote.size)})")
    for attempt in range(2):
        with progress.task(f"Downloading {target.name}", remote.size or None, "bytes") as advance:
            reach = _reaching(advance)
            reach(_length(part))
            with client.gate(host_of(remote.url)):
                work, resumed = partial(_take, client, remote, part, reach), bool(remote.validator)
                _patiently(client, remote.url, work, lambda: _length(part), resumed=resumed)
        if not remote.md5 or md5_of(part) == remote.md5:
            return
        part.unlink()  # from a broken disk, or of a file that changed without a new validator: once more from the start
        if attempt:
            raise SourceError(
                f"{target.name} from {host_of(remote.url)} does not have the checksum that the server tells.",
                hint="Try again later: the file may just be being replaced.",
            )
        log.warning("%s does not have the checksum that the server tells; downloading it anew.", target.name)


def _reaching(advance: Advance) -> Callable[[int], None]:
    """Return what shows the length that is reached, also where it is less than before."""
    shown = 0

    def reach(length: int) -> None:
        nonlocal shown
        advance(length - shown)
        shown = length

    return reach


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _same(note: Path, remote: Remote) -> bool:
    """Return whether the part that lies there is one of the very file that the server has now."""
    with suppress(OSError, ValueError, TypeError):
        known = Remote(**json.loads(note.read_text(encoding="utf-8")))
        # Without a validator or checksum nobody can say.
        return known == remote and bool(remote.validator or remote.md5)
    return False


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _patiently(
    client: Client, url: str, work: Callable[[], T], length: Callable[[], int], *, resumed: bool = False
) -> T:
    """Try ``work`` again after what may pass, with capped and announced waits; progress starts the count anew.

    ``resumed``: a later run goes on from the ``length`` that is reached.
    """
    attempt, waited, reached = 0, 0.0, length()
    while True:
        try:
            return work()
        except _Stop as error:
            raise client.refused(url, str(error)) from None
        except _Again as error:
            problem = str(error)
            if error.wait_s > client.max_wait_s:
                problem = f"{problem}, and it asks to wait {rough(error.wait_s)}"
            if length() >= reached + _PROGRESS_BYTES:
                attempt, waited, reached = 0, 0.0, length()
            wait = error.wait_s or _FIRST_WAIT_S * 2**attempt
            attempt += 1
            if attempt >= error.tries or waited + wait > client.max_wait_s:
                kept = " What is there of the file is kept." if resumed and length() else ""
                raise client.failed(url, f"{problem}, after {counted(attempt)}.{kept}".rstrip(".")) from None
            log.info("%s (%s): %s; next try in %s.", client.name, host_of(url), problem, rough(wait))
            client.sleep(wait)
            waited += wait


def _ask(client: Client, method: str, url: str, headers: dict[str, str]) -> requests.Response:
    """Return the answer to a request, its body unread. Raises :class:`_Again` or :class:`_Stop`."""
    sent = {"Accept-Encoding": "identity", **headers}
    timeout = (client.timeout_s[0], min(client.timeout_s[1], _READ_S))
    try:
        with asking(url), new_session(client.user_agent) as session:
            answer = session.request(method, url, headers=sent, timeout=timeout, stream=True, allow_redirects=True)
    except Unanswered as error:
        raise (_Again if error.passes else _Stop)(str(error)) from None
    said = f"status {answer.status_code} {answer.reason}".strip()
    if answer.status_code in _RETRIED:
        answer.close()
        raise _Again(said, retry_after(answer))
    if answer.status_code not in (200, 206, 416):
        answer.close()
        if method == "HEAD" and answer.status_code in _NO_HEAD:
            return _ask(client, "GET", url, headers)
        raise _Stop(said)
    return answer


def _head(client: Client, url: str) -> Remote:
    with _ask(client, "HEAD", url, {}) as answer:  # a body, where a server sends one, is left unread
        return Remote(url, length_of(answer) or 0, _validator(answer))


def _validator(answer: requests.Response) -> str:
    """Return the strong validator of an answer, "" where it has none: weak ones do not allow parts."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _take(client: Client, remote: Remote, part: Path, reach: Callable[[int], None]) -> None:
    """Ask for what is missing and append it. Raises :class:`_Again` where it breaks off."""
    have = _length(part)
    if remote.size and have == remote.size:
        return
    framing = Framing()
    if have > remote.size > 0 or (have and framing.follow(part)):
        part.unlink()
        have = 0
    headers = {"Range": f"bytes={have}-", "If-Range": remote.validator} if have and remote.validator else {}
    with _ask(client, "GET", remote.url, headers) as answer:
        if answer.status_code == 416:
            part.unlink(missing_ok=True)
            raise _Again("the server refuses to send the rest")
        whole = answer.status_code == 200
        announced = length_of(answer)
        if whole and remote.size and announced is not None and announced != remote.size:
            try:
                with asking():
                    problem = Framing().feed(answer.raw.read(_HEAD))
            except Unanswered as error:
                problem = str(error)
            if problem:
                raise _Again(problem)
            problem = f"it announced {remote.size} bytes and sends {announced}: the file is being replaced"
            raise _Again(problem, tries=_TRIES_OF_OTHERS)
        if not whole and _start(answer) != have:
            raise _Stop("the server sends another part than the one asked for")
        if whole:
            framing = Framing()
        reach(framing.size)
        _append(answer, remote, part, framing, reach)
    problem = framing.ended()
    if not framing.blocks:
        part.unlink()
    elif remote.size and framing.size < remote.size:
        problem = f"the connection broke after {framing.size} of {remote.size} bytes"
    elif problem and remote.size:  # the server's own file is cut off: there is no rest to ask for
        part.unlink()
        raise _Again(problem, tries=_TRIES_OF_OTHERS)
    if problem:
        raise _Again(problem)


def _start(answer: requests.Response) -> int:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match.group(1)) if match else -1


def _append(
    answer: requests.Response, remote: Remote, part: Path, framing: Framing, reach: Callable[[int], None]
) -> None:
    limit = remote.size or _MOST_BYTES
    looked = framing.size
    pace = Pace()
    try:
        with asking(), disk_of(part), part.open("ab" if framing.size else "wb") as file:
            while piece := answer.raw.read1(1 << 18):
                if framing.size + len(piece) > limit:
                    file.truncate(0)  # nobody knows which of it is the file
                    known = f"the {limit} bytes that it announced" if remote.size else size(limit)
                    raise _Again(f"it sends more than {known}", tries=_TRIES_OF_OTHERS)
                if problem := framing.feed(piece):
                    file.truncate(0)
                    raise _Again(problem, tries=_TRIES_OF_OTHERS if framing.blocks else None)
                file.write(piece)
                reach(framing.size)
                if not remote.size and framing.size - looked > _LOOK_BYTES:
                    looked = framing.size
                    rest = f"The rest of {part.stem}, of unknown length after {size(looked)},"
                    try:
                        require_space(part.parent, _SPARE_BYTES, rest)
                    except DiskError:
                        file.truncate(0)  # it may have no end
                        raise
                if (slow := pace.too_slow(len(piece))) is not None:
                    raise _Again(f"it sends only {slow:.0f} bytes a second")
    except Unanswered as error:
        raise _Again(str(error)) from None
