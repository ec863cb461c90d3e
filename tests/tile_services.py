"""A local HTTP server that plays a tile service, and misbehaves on demand."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import shapely
from in_background import in_background
from numpy.typing import NDArray
from PIL import Image

from rsosm_cli.imagery import prepare
from rsosm_cli.imagery.tile_grid import HALF_WORLD_M
from rsosm_cli.settings import FetchSettings

Answer = tuple[int, dict[str, str], bytes]
TILE_PX = 64
ZOOM = 17
# In Banepa: with the margin of prepare_imagery (200 m) 3 x 3 tiles of zoom 17.
PLACE = shapely.box(85.5205, 27.6305, 85.5235, 27.6325)


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def vast_png(side: int) -> bytes:
    """Return a picture that says that it has ``side`` times ``side`` pixels, and has hardly one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def pixels_of(x: int, y: int, size: int = TILE_PX) -> NDArray[np.uint8]:
    return np.random.default_rng([x, y]).integers(0, 256, (size, size, 3), dtype=np.uint8)


def tile(x: int, y: int) -> Answer:
    return 200, {"Content-Type": "image/png"}, png(pixels_of(x, y))


def capabilities(address: str, *, rest: bool, crs: str = "urn:ogc:def:crs:EPSG::3857") -> bytes:
    """Return a WMTS's description of one layer in zooms 16 and 17 of tiles of 64 pixels, called day:16 and day:17."""
    world = 2 * HALF_WORLD_M
    matrices = "".join(
        f"<TileMatrix><ows:Identifier>day:{z}</ows:Identifier>"
        f"<ScaleDenominator>{world / (TILE_PX << z) / 0.00028!r}</ScaleDenominator>"
        f"<TopLeftCorner>{-HALF_WORLD_M:.2f} {HALF_WORLD_M:.2f}</TopLeftCorner><TileWidth>{TILE_PX}</TileWidth>"
        f"<TileHeight>{TILE_PX}</TileHeight><MatrixWidth>{1 << z}</MatrixWidth></TileMatrix>"
        for z in (16, 17)
    )
    template = f"{address}/wmts/{{Time}}/{{Style}}/{{TileMatrixSet}}/{{TileMatrix}}/{{TileCol}}/{{TileRow}}.png"
    resource = f'<ResourceURL format="image/png" resourceType="tile" template="{template}"/>' if rest else ""
    return f"""<?xml version="1.0"?>
<Capabilities xmlns="http://www.opengis.net/wmts/1.0" xmlns:ows="http://www.opengis.net/ows/1.1"
 xmlns:xlink="http://www.w3.org/1999/xlink" version="1.0.0">
<ows:ServiceIdentification><ows:Title>Air photos</ows:Title><ows:Fees>none</ows:Fees>
<ows:AccessConstraints>CC-BY-4.0</ows:AccessConstraints></ows:ServiceIdentification>
<ows:ServiceProvider><ows:ProviderName>Land survey</ows:ProviderName></ows:ServiceProvider>
<ows:OperationsMetadata><ows:Operation name="GetTile"><ows:DCP><ows:HTTP><ows:Get xlink:href="{address}/kvp?">
<ows:Constraint name="GetEncoding"><ows:AllowedValues><ows:Value>KVP</ows:Value></ows:AllowedValues></ows:Constraint>
</ows:Get></ows:HTTP></ows:DCP></ows:Operation></ows:OperationsMetadata>
<Contents><Layer><ows:Identifier>ortho</ows:Identifier>
<Style isDefault="true"><ows:Identifier>s</ows:Identifier></Style>
<Format>image/png</Format><Dimension><ows:Identifier>Time</ows:Identifier><Default>d0</Default></Dimension>
<TileMatrixSetLink><TileMatrixSet>utm</TileMatrixSet></TileMatrixSetLink>
<TileMatrixSetLink><TileMatrixSet>web</TileMatrixSet></TileMatrixSetLink>{resource}</Layer>
<TileMatrixSet><ows:Identifier>utm</ows:Identifier><ows:SupportedCRS>EPSG:32645</ows:SupportedCRS></TileMatrixSet>
<TileMatrixSet><ows:Identifier>web</ows:Identifier><ows:SupportedCRS>{crs}</ows:SupportedCRS>{matrices}</TileMatrixSet>
</Contents></Capabilities>""".encode()


def tile_map() -> bytes:
    """Return a TMS's description of one zoom of tiles of 64 pixels."""
    upp = 2 * HALF_WORLD_M / (TILE_PX << ZOOM)
    return (
        '<TileMap version="1.0.0"><Title>Old sheets</Title><SRS>EPSG:900913</SRS>'
        f'<TileFormat width="{TILE_PX}" height="{TILE_PX}" extension="png"/>'
        f'<TileSets profile="mercator"><TileSet href="{ZOOM}" units-per-pixel="{upp!r}" order="{ZOOM}"/></TileSets>'
        "</TileMap>"
    ).encode()


class Service(ThreadingHTTPServer):
    """A tile service; ``answer(z, x, y, asked_before)`` may be replaced to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[tuple[int, int, int]] = Counter()
        self.paths: list[str] = []
        self.documents: dict[str, bytes] = {}
        self.described = 0  # times that a document was asked for
        self.drip_s = 0.0  # between the bytes of a document
        self.agents: set[str] = set()
        self.lock = threading.Lock()
        self.answer: Callable[[int, int, int, int], Answer | str] = lambda z, x, y, n: tile(x, y)

    @property
    def template(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{{z}}/{{x}}/{{y}}.png"

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that a test breaks off are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        document = self.server.documents.get(self.path.partition("?")[0])
        if document is not None and "GetTile" not in self.path:
            self.send_response(200)
            self.send_header("Content-Length", str(len(document)))
            self.end_headers()
            with self.server.lock:
                self.server.described += 1
            step = 1 if self.server.drip_s else len(document)
            for start in range(0, len(document), step):
                self.wfile.write(document[start : start + step])
                time.sleep(self.server.drip_s)
            return
        form = dict(part.split("=", 1) for part in self.path.partition("?")[2].split("&") if "=" in part)
        asked = self.path
        if "TILEMATRIX" in form:
            self.path = f"/{form['TILEMATRIX'].rpartition('%3A')[2]}/{form['TILECOL']}/{form['TILEROW']}"
        z, x, y = (int(n) for n in re.findall(r"-?\d+", self.path.partition("?")[0])[:3])
        with self.server.lock:
            before = self.server.asked[z, x, y]
            self.server.asked[z, x, y] += 1
            self.server.paths.append(asked)
            self.server.agents.add(self.headers.get("User-Agent", ""))
        answer = self.server.answer(z, x, y, before)
        if answer == "reset":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"half")
            return
        if answer == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)
            return
        if answer == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(b"x" * 65536)
        assert not isinstance(answer, str)
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def fetch(folder: Path, source: str, place: shapely.Geometry = PLACE, gsd_m: float | None = 0.6, **settings: object):
    values: dict[str, object] = {"xyz_zoom": ZOOM, "xyz_rate": 5000.0, "max_wait_s": 5.0} | settings
    return prepare.prepare_imagery(
        [source], place, folder, folder / "imagery.tif", gsd_m=gsd_m, settings=FetchSettings(**values)
    )


@contextmanager
def serving_tiles() -> Iterator[Service]:
    with in_background(Service()) as server:
        yield server


SCRIPT = """
import sys
from pathlib import Path
import shapely
from rsosm_cli.imagery.prepare import prepare_imagery
from rsosm_cli.settings import FetchSettings
template, folder, *box = sys.argv[1:]
prepare_imagery([template], shapely.box(*map(float, box)), Path(folder), Path(folder) / "imagery.tif", gsd_m=None,
                settings=FetchSettings(xyz_zoom=17, xyz_rate=5000))
"""


def kill_in_the_middle(service: Service, source: str, folder: Path) -> set[tuple[int, ...]]:
    """Fetch into ``folder`` in a process that is killed after some tiles; return those that it left."""
    hang, usual = threading.Event(), service.answer

    def answer(z: int, x: int, y: int, n: int) -> Answer | str:
        if len(service.asked) > 5:
            hang.wait(20)
        return usual(z, x, y, n)

    service.answer = answer
    command = [sys.executable, "-c", SCRIPT, source, str(folder), *map(str, PLACE.bounds)]
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1])
    deadline = time.monotonic() + 60
    while len(service.asked) <= 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # for the tiles answered to reach the disk
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    hang.set()
    service.answer = usual
    service.asked.clear()
    return {tuple(map(int, p.parts[-3:])) for p in folder.rglob("*") if p.is_file() and p.name.isdigit()}
