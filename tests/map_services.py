"""A local HTTP server that plays Nominatim and Overpass, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

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


def osm_xml(*, remark: str = "") -> bytes:
    """Return an answer of Overpass: a building, a street and a café."""
    corners = [(10.001, 50.001), (10.002, 50.001), (10.002, 50.002), (10.001, 50.002)]
    nodes = "".join(f'<node id="{i + 1}" lat="{lat}" lon="{lon}"/>' for i, (lon, lat) in enumerate(corners))
    refs = "".join(f'<nd ref="{i}"/>' for i in (1, 2, 3, 4, 1))
    note = f"<remark>{remark}</remark>" if remark else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<osm version="0.6" generator="Overpass API">'
        f"{nodes}"
        '<node id="9" lat="50.005" lon="10.005"><tag k="amenity" v="cafe"/></node>'
        f'<way id="1">{refs}<tag k="building" v="yes"/></way>'
        '<way id="2"><nd ref="1"/><nd ref="3"/><tag k="highway" v="residential"/></way>'
        f"{note}</osm>\n"
    ).encode()


@dataclass
class Reply:
    """One answer. ``cut``: bytes of the body that are sent before the connection is closed; ``reset``: none at all."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False


class Services(ThreadingHTTPServer):
    """``places`` and ``overpass`` are what the two answer; replies in ``trouble`` are given first, in turn."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.places: list[dict[str, Any]] = [place()]
        self.overpass: Callable[[str], Reply] = lambda query: Reply(osm_xml())
        self.trouble: list[Reply] = []
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.agents: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are broken on purpose are no news."""

    def settings(self, **values: Any) -> FetchSettings:
        """Return settings that send every question here."""
        address = f"http://127.0.0.1:{self.server_port}"
        return FetchSettings(overpass_url=f"{address}/api", nominatim_url=f"{address}/nominatim/", **values)


class _Handler(BaseHTTPRequestHandler):
    server: Services

    def log_message(self, *args: object) -> None:
        """Tests are silent."""

    def do_GET(self) -> None:
        self._answer(urlsplit(self.path).query)

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def _answer(self, form: str) -> None:
        services = self.server
        with services.lock:
            services.at_once += 1
            services.most_at_once = max(services.at_once, services.most_at_once)
            data = {k: v[0] for k, v in parse_qs(form).items()}
            services.asked.append((urlsplit(self.path).path, data))
            services.agents.append(self.headers["User-Agent"])
            trouble = services.trouble.pop(0) if services.trouble else None
        try:
            self._send(trouble or self._usual(data))
        finally:
            with services.lock:
                services.at_once -= 1

    def _usual(self, data: dict[str, str]) -> Reply:
        if self.path.startswith("/nominatim/"):
            return Reply(json.dumps(self.server.places).encode(), headers={"Content-Type": "application/json"})
        return self.server.overpass(data["data"])

    def _send(self, reply: Reply) -> None:
        if reply.reset:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body[: reply.cut])
        if reply.cut is not None:
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Services]:
    server = Services()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
