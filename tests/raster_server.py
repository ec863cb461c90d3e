"""A web server of rasters, which plays S3, too. In a process of its own: GDAL holds Python's lock while it waits.

    python raster_server.py FOLDER

Prints its port. ``FOLDER/BUCKET/KEY`` is an object; of the bucket ``private`` those alone can read who sign their
requests; of ``broken`` every answer is status 500; of ``tired`` all that begins behind the first 16 KB is status 503;
of ``simple`` files come whole, whatever part is asked for.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Objects(BaseHTTPRequestHandler):
    """Gives parts of files, as web servers and S3 do, and S3's errors."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing reads them."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file = Path(sys.argv[1] + path)
        if path.startswith("/broken/"):
            self._refuse(500, "InternalError")
        elif path.startswith("/private/") and "Authorization" not in self.headers:
            self._refuse(403, "AccessDenied")
        elif not Path(sys.argv[1], path.split("/")[1]).is_dir():
            self._refuse(404, "NoSuchBucket")
        elif not file.is_file():
            self._refuse(404, "NoSuchKey")
        elif path.startswith("/tired/") and self._first() >= 16_384:
            self._refuse(503, "SlowDown")
        else:
            self._give(file.read_bytes())

    def _first(self) -> int:
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}.</Message></Error>".encode()
        self._send(status, body, {"Content-Type": "application/xml"})

    def _give(self, body: bytes) -> None:
        simple = self.path.startswith("/simple/")
        wanted = None if simple else self.headers.get("Range")
        if wanted is None:
            self._send(200, body, {} if simple else {"Accept-Ranges": "bytes"})
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else len(body)]
        if not part:
            self._send(416, b"", {})
            return
        self._send(206, part, {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving_rasters(folder: Path) -> Iterator[str]:
    """Serve the files of a folder while a test runs; yields host and port."""
    command = [sys.executable, __file__, str(folder)]
    with (
        (folder.parent / "port.txt").open("w") as port,
        subprocess.Popen(command, stdout=port, stderr=subprocess.DEVNULL) as server,
    ):
        try:
            deadline = time.monotonic() + 20
            while not (said := Path(port.name).read_text().partition("\n"))[1]:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server of rasters did not start")
                time.sleep(0.02)
            yield f"127.0.0.1:{said[0]}"
        finally:
            server.terminate()


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), _Objects) as _server:
        print(_server.server_port, flush=True)
        _server.serve_forever()
