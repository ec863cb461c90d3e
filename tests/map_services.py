"""A local HTTP server that plays Nominatim, Overpass and a server of files (an index, extracts, tiles, the documents
and images of STAC), and misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

from in_background import in_background

from rsosm_cli.settings import FetchSettings

# A town of a square kilometre and a half near 10 E, 50 N.
WEST, SOUTH, EAST, NORTH = 10.0, 50.0, 10.018, 50.012
SQUARE = [[[WEST, SOUTH], [EAST, SOUTH], [EAST, NORTH], [WEST, NORTH], [WEST, SOUTH]]]


def place(name: str = "Klein Testdorf", *, geojson: Any = None, osm_id: int = 42) -> dict[str, Any]:
    """Return one answer of Nominatim, format jsonv2."""
    return {
        "place_id": 1, "osm_type": "relation", "osm_id": osm_id, "lat": "50.006", "lon": "10.009",
        "category": "boundary", "type": "administrative", "display_name": f"{name}, Testland",
        "address": {"country_code": "de"}, "extratags": {"admin_level": "8"},
        "geojson": geojson or {"type": "Polygon", "coordinates": SQUARE},
    }  # fmt: skip


def osm_xml(*, remark: str = "", west: float = WEST, south: float = SOUTH) -> bytes:
    """Return an answer of Overpass: a building, a street and a café."""
    corners = [(1, 1), (2, 1), (2, 2), (1, 2)]
    nodes = "".join(
        f'<node id="{i + 1}" lat="{south + y / 1000:.3f}" lon="{west + x / 1000:.3f}"/>'
        for i, (x, y) in enumerate(corners)
    )
    refs = "".join(f'<nd ref="{i}"/>' for i in (1, 2, 3, 4, 1))
    note = f"<remark>{remark}</remark>" if remark else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<osm version="0.6" generator="Overpass API">'
        f"{nodes}"
        f'<node id="9" lat="{south + 0.005:.3f}" lon="{west + 0.005:.3f}"><tag k="amenity" v="cafe"/></node>'
        f'<way id="1">{refs}<tag k="building" v="yes"/></way>'
        '<way id="2"><nd ref="1"/><nd ref="3"/><tag k="highway" v="residential"/></way>'
        f"{note}</osm>\n"
    ).encode()


def count(**numbers: int) -> bytes:
    """Return an answer of Overpass to ``out count``."""
    tags = {k: str(v) for k, v in {**numbers, "total": sum(numbers.values())}.items()}
    return json.dumps({"version": 0.6, "elements": [{"type": "count", "id": 0, "tags": tags}]}).encode()


def region(name: str, url: str, box: tuple[float, float, float, float], parent: str = "") -> dict[str, Any]:
    """Return a feature of the index of extracts."""
    west, south, east, north = box
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    facts = {"id": name, "name": name.title(), "urls": {"pbf": url}} | ({"parent": parent} if parent else {})
    return {"type": "Feature", "properties": facts, "geometry": {"type": "MultiPolygon", "coordinates": [[ring]]}}


@dataclass
class Reply:
    """One answer. ``cut``: bytes of the body that are sent before the connection is closed; ``reset``: it is reset
    then, or before any answer; ``{again}`` in a header: the address asked for; ``drip``: seconds between single bytes;
    ``endless``: the body again and again, without a length; ``hang_at``: bytes that are sent before nothing comes until
    ``release`` of the server is set."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    drip: float = 0.0
    endless: bool = False
    hang_at: int | None = None


@dataclass
class Upset:
    """The first ``times`` requests for what ``pattern`` finds (in "GET /path?query form") are answered by ``reply``.

    ``usual``: with the body that it would have had, to which ``reply`` adds its faults; ``half``: with the first half
    of it, of a length that agrees. ``met`` counts the requests."""

    pattern: str
    reply: Reply
    times: int
    usual: bool = False
    half: bool = False
    met: int = 0


class Services(ThreadingHTTPServer):
    """``places``, ``overpass`` and ``files`` (path: bytes) are what is answered; replies in ``trouble`` are given
    first, in turn, to all questions but Overpass's counts. ``asked`` are questions with their form, ``counted`` those
    for counts, ``ranges`` the files asked for, with the ``Range`` of each. ``upset`` comes before all of it."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.scheme = "http"
        if tls is not None:
            self.scheme, self.socket = "https", tls.wrap_socket(self.socket, server_side=True)
        self.places: list[dict[str, Any]] = [place()]
        self.overpass: Callable[[str], Reply] = lambda query: Reply(osm_xml())
        self.count: Reply = Reply(count(nodes=1, ways=2, relations=0))
        self.files: dict[str, bytes] = {}
        self.ranges: list[tuple[str, str, str]] = []
        self.counted: list[str] = []
        self.release = threading.Event()
        self.trouble: list[Reply] = []
        self.upset: Upset | None = None
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.agents: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are broken on purpose are no news."""

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def settings(self, **values: Any) -> FetchSettings:
        """Return settings that send every question here."""
        urls = {
            "overpass_url": f"{self.address}/api", "nominatim_url": f"{self.address}/nominatim/",
            "extracts_url": f"{self.address}/index-v1.json",
        }  # fmt: skip
        return FetchSettings(**{**urls, **values})

    def offer(self, name: str, data: bytes) -> str:
        """Offer a file with its checksum; return its address."""
        self.files[f"/{name}"] = data
        self.files[f"/{name}.md5"] = f"{hashlib.md5(data).hexdigest()}  {name}\n".encode()
        return f"{self.address}/{name}"

    def offer_index(self, *regions: dict[str, Any]) -> None:
        index = {"type": "FeatureCollection", "features": list(regions)}
        self.files["/index-v1.json"] = json.dumps(index).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Services

    def log_message(self, *args: object) -> None:
        """Tests are silent."""

    def do_GET(self) -> None:
        self._answer(urlsplit(self.path).query)

    def do_HEAD(self) -> None:
        self._answer(urlsplit(self.path).query)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def _answer(self, form: str) -> None:
        services = self.server
        data = {k: v[0] for k, v in parse_qs(form).items()}
        path = urlsplit(self.path).path
        with services.lock:
            upset = self._upset(form)
        if upset is not None:
            self._send(_with_faults(self._usual(path, data), upset) if upset.usual else upset.reply)
            return
        if "out count" in data.get("data", ""):
            services.counted.append(data["data"])
            self._send(self._usual(path, data))
            return
        with services.lock:
            services.at_once += 1
            services.most_at_once = max(services.at_once, services.most_at_once)
            services.agents.append(self.headers["User-Agent"])
            if path in services.files:
                services.ranges.append((self.command, path, self.headers.get("Range", "")))
            else:
                services.asked.append((path, data))
            trouble = services.trouble.pop(0) if services.trouble else None
        try:
            self._send(trouble or self._usual(path, data))
        finally:
            with services.lock:
                services.at_once -= 1

    def _upset(self, form: str) -> Upset | None:
        upset = self.server.upset
        if upset is None or not re.search(upset.pattern, f"{self.command} {self.path} {unquote_plus(form)}"):
            return None
        upset.met += 1
        return upset if upset.met <= upset.times else None

    def _usual(self, path: str, data: dict[str, str]) -> Reply:
        if "out count" in data.get("data", ""):
            return self.server.count
        if path in self.server.files:
            return self._file(self.server.files[path])
        if path.startswith("/nominatim/"):
            return Reply(json.dumps(self.server.places).encode(), headers={"Content-Type": "application/json"})
        return self.server.overpass(data["data"]) if "data" in data else Reply(status=404)

    def _file(self, body: bytes) -> Reply:
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if wanted is None or self.headers.get("If-Range", tag) != tag:
            return Reply(body, headers=headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
        if first > last:
            return Reply(status=416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return Reply(body[first : last + 1], 206, headers)

    def _send(self, reply: Reply) -> None:
        if reply.reset and reply.cut is None:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value.replace("{again}", self.path))
        if not reply.endless and "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(OSError):  # a client that gave up
            while reply.endless:
                self.wfile.write(reply.body)
            for i in range(len(reply.body) if reply.drip else 0):
                self.wfile.write(reply.body[i : i + 1])
                self.wfile.flush()
                time.sleep(reply.drip)
            if reply.hang_at is not None:
                self.wfile.write(reply.body[: reply.hang_at])
                self.wfile.flush()
                self.server.release.wait(60)
            elif not reply.drip:
                self.wfile.write(reply.body[: reply.cut])
        if reply.reset:
            self.wfile.flush()
            # Closing without a word of what is still under way: the other side meets a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if reply.cut is not None or reply.endless or reply.drip or reply.hang_at is not None:
            self.close_connection = True


def _with_faults(usual: Reply, upset: Upset) -> Reply:
    """Return the usual answer with the faults of another; its ``cut``, where it has one, is half of the body."""
    half, faults = len(usual.body) // 2, upset.reply
    body = usual.body[:half] if upset.half else usual.body
    headers = usual.headers | faults.headers
    return replace(faults, body=body, status=usual.status, headers=headers, cut=None if faults.cut is None else half)


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Services]:
    with in_background(Services(tls)) as server:
        yield server
