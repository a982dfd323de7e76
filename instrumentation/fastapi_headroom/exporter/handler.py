"""One connection of the exporter: its requests, bounded in bytes and time, and their answers."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any, cast

from fastapi_headroom.exporter import exposition
from fastapi_headroom.exporter.scrape import StoppedError

if TYPE_CHECKING:
    from fastapi_headroom.exporter.server import MetricsServer

log = logging.getLogger("fastapi_headroom")

MAX_REQUEST_BYTES = 16 * 1024
"""Request line and headers together; Prometheus sends about 300 bytes."""
SILENT_SECONDS = 0.05
"""For a client to go on before another one may take its place, when all are taken."""
REQUEST_SECONDS = 10.0
"""For a request to arrive, and for its response to be taken."""
IDLE_SECONDS = 120.0
"""For a connection that is kept alive between scrapes."""

_NO_HEADERS: Mapping[str, str] = {}
_PAGE = b"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastapi-headroom</title></head>
<body><h1>fastapi-headroom</h1>
<p><a href="/metrics">/metrics</a> for Prometheus (text, or OpenMetrics by its Accept header)</p>
<p><a href="/healthz">/healthz</a> for a look at the exporter itself</p>
</body></html>
"""


class Connection:
    """When a connection did its last step, and whether it is answering: who must go first when there is no room."""

    __slots__ = ("answering", "since", "socket", "waiting")

    def __init__(self, request: socket.socket) -> None:
        self.socket = request
        self.since = time.monotonic()
        self.waiting = False
        self.answering = False

    def step(self, *, waiting: bool = False, answering: bool = False) -> None:
        """Take note of a step: the wait for another request, the answer to one, or else a part of a request."""
        self.since, self.waiting, self.answering = time.monotonic(), waiting, answering

    def precedence(self) -> tuple[bool, float]:
        """Sort those first that wait for their client, the longest wait before all."""
        return self.answering, self.since

    def silent(self, now: float) -> bool:
        """Return whether the client could have sent its request, and has not."""
        return not self.answering and now - self.since > SILENT_SECONDS

    def overdue(self, now: float) -> bool:
        """Return whether the client has kept its thread waiting for too long."""
        if self.answering:
            return False  # the time-out of each write bounds it
        return now - self.since > (IDLE_SECONDS if self.waiting else REQUEST_SECONDS)


class _BoundedReader:
    """The reading side of a connection, which gives up on requests of more than MAX_REQUEST_BYTES."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file, self._left = file, MAX_REQUEST_BYTES

    def renew(self) -> None:
        self._left = MAX_REQUEST_BYTES

    def readline(self, limit: int = -1) -> bytes:
        line = self._file.readline(min(limit, self._left + 1) if limit >= 0 else self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise LineTooLong("request")
        return line

    def close(self) -> None:
        self._file.close()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, on the connection's own thread."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that a request that cannot be parsed is answered with a status line
    timeout = None  # the sweep bounds reads; writes set theirs
    server: MetricsServer
    disable_nagle_algorithm = True
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def version_string(self) -> str:
        """Name the product, and no versions to strangers."""
        return "fastapi-headroom"

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(REQUEST_SECONDS)
            self.request.do_handshake()
        super().setup()
        self.request.settimeout(IDLE_SECONDS)
        self._bounded = _BoundedReader(self.rfile)
        self.rfile = cast(Any, self._bounded)
        self._state = self.server.state_of(self.request)

    def handle_one_request(self) -> None:
        """Read one request and answer it; differs from the standard one in the bound on its size."""
        self._bounded.renew()
        try:
            self.raw_requestline = self.rfile.readline(MAX_REQUEST_BYTES + 1)
            self._state.step()
            if not self.raw_requestline:
                self.close_connection = True
            elif self.parse_request():
                self._state.step(answering=True)
                self.request.settimeout(REQUEST_SECONDS)
                self._answer()
        except LineTooLong:
            self.requestline, self.request_version, self.command = "", "HTTP/1.1", ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
        except (TimeoutError, ConnectionError):
            self.close_connection = True
            return
        self.request.settimeout(IDLE_SECONDS)
        self._state.step(waiting=True)

    def _answer(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED)
            self.close_connection = True  # a body that nobody reads may follow
            return
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self.close_connection = True
        path = self.path.partition("?")[0]
        if self.server.access is not None and not self.server.access.allows(self.headers.get("Authorization", "")):
            self._refuse(path)
        elif path == "/metrics":
            self._metrics()
        elif path == "/healthz":
            self._send(json.dumps(self.server.health()).encode() + b"\n", "application/json")
        elif path == "/":
            self._send(_PAGE, "text/html; charset=utf-8")
        else:
            self._send(b"404 Not Found: try /metrics or /healthz\n", "text/plain; charset=utf-8", HTTPStatus.NOT_FOUND)

    def _refuse(self, path: str) -> None:
        """Answer who has no token: that we are alive, for probes that cannot have one, and nothing else."""
        if path == "/healthz":
            self._send(b'{"status": "ok"}\n', "application/json")
            return
        self._send(
            b"401 Unauthorized: show the exporter's bearer token\n",
            "text/plain; charset=utf-8",
            HTTPStatus.UNAUTHORIZED,
            {"WWW-Authenticate": 'Bearer realm="fastapi-headroom"'},
        )

    def _metrics(self) -> None:
        openmetrics = exposition.wants_openmetrics(self.headers.get("Accept", ""))
        compressed = exposition.wants_gzip(self.headers.get("Accept-Encoding", ""))
        try:
            body = self.server.scraper.scrape(openmetrics=openmetrics, compressed=compressed)
        except StoppedError:
            self.close_connection = True
            return
        except Exception:
            if not self.server.scraper.failing:  # once until it works again: every request may come here
                log.exception(
                    "fastapi-headroom: a scrape of %s failed; the next one starts afresh", self.server.directory
                )
            self.server.scraper.failing = True
            self._send(
                b"500 the scrape failed; the exporter's log says why\n",
                "text/plain; charset=utf-8",
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
            return
        self.server.scraper.failing = False
        headers = {"Vary": "Accept, Accept-Encoding"} | ({"Content-Encoding": "gzip"} if compressed else {})
        self._send(body, exposition.OPENMETRICS if openmetrics else exposition.TEXT, headers=headers)

    def _send(
        self,
        body: bytes,
        content_type: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing: scrapes are no news."""
