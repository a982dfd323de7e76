"""The exporter's HTTP server: /metrics, /healthz and a page of links, from the standard library alone.

It is built for bad company. Connections are bounded, and each has a thread; when all are taken, a new connection
displaces the one that has been silent for longest, so half-open connections cannot keep a scraper out; a crowd of
scrapers, of which none is silent, waits its turn.
Requests are bounded in bytes, and every socket has time-outs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import socketserver
import threading
import time
from pathlib import Path
from typing import Any, cast

from fastapi_headroom.errors import HeadroomError, PortInUseError
from fastapi_headroom.exporter.access import Access
from fastapi_headroom.exporter.handler import Connection, Handler
from fastapi_headroom.exporter.locks import slots_alive
from fastapi_headroom.exporter.scrape import Scraper

log = logging.getLogger("fastapi_headroom")

MAX_CONNECTIONS = 32
_SWEEP_SECONDS = 0.5
_PATIENCE_SECONDS = 1.0
"""How long a new connection waits for room before it takes that of one that is being answered."""


class MetricsServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves one store. Listens when constructed, answers after :meth:`start`.

    Raises PortInUseError when the port is taken, HeadroomError when the address cannot be listened on.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, host: str, port: int, scraper: Scraper, directory: Path, access: Access | None = None) -> None:
        self.scraper, self.directory, self.access = scraper, directory, access
        self._tls = access.tls if access is not None else None
        self._connections: dict[socket.socket, Connection] = {}
        self._guard = threading.Condition()
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__(cast(Any, address), Handler)
        except OSError as error:
            raise _not_listening(host, port, error) from error
        self._thread = threading.Thread(target=self._serve, name="headroom-exporter", daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on, also where port 0 asked for any."""
        return int(self.socket.getsockname()[1])

    @property
    def alive(self) -> bool:
        """Whether connections are accepted."""
        return self._thread.is_alive()

    @property
    def url(self) -> str:
        """The address for people: of the metrics."""
        host = str(self.socket.getsockname()[0])
        scheme = "https" if self._tls is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def start(self) -> None:
        """Answer requests on a daemon thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and end every connection. Idempotent."""
        _end(self.socket)  # ends the accepting thread, which else looks up twice a second
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        with self._guard:
            for connection in self._connections.values():
                _end(connection.socket)

    def abandon(self) -> None:
        """Close what a forked child inherited, so that the port is free when the parent dies.

        Takes no lock, as a thread of the parent may have held it, and shuts no connection down: they are the parent's.
        """
        self.socket.close()
        for connection in list(self._connections):
            if connection.fileno() >= 0:
                os.close(connection.detach())  # close() would wait for file objects of threads that are not here
        self._connections.clear()

    def _serve(self) -> None:
        with contextlib.suppress(_NotListeningError):
            self.serve_forever(_SWEEP_SECONDS)

    # -- connections: socketserver calls these from the accepting thread, but for shutdown_request

    def get_request(self) -> Any:
        """Accept a connection. The loop around it takes no error seriously and would spin on these."""
        try:
            request, address = super().get_request()
            if self._tls is not None:
                # The handshake is for the connection's own thread: it waits for the client.
                request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
            return request, address
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTSOCK, errno.EINVAL):
                raise _NotListeningError from error
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.1)  # the connection stays in the backlog until there are descriptors again
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a connection's thread, after making room for it."""
        with self._guard:
            if len(self._connections) >= MAX_CONNECTIONS:
                self._make_room()
            self._connections[request] = Connection(request)
        super().process_request(request, client_address)

    def _make_room(self) -> None:
        """Displace a silent connection, or wait for the end of one; the others wait in the backlog meanwhile."""
        latest = time.monotonic() + _PATIENCE_SECONDS
        while len(self._connections) >= MAX_CONNECTIONS:
            displaced, now = min(self._connections.values(), key=Connection.precedence), time.monotonic()
            if displaced.silent(now) or now > latest:
                del self._connections[displaced.socket]
                _end(displaced.socket)
            else:
                self._guard.wait(0.02)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that its thread has done with."""
        with self._guard:
            self._connections.pop(request, None)
            self._guard.notify()
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that are overdue, and look for a new certificate; called twice a second."""
        if self.access is not None:
            self.access.refresh()
        now = time.monotonic()
        with self._guard:
            for connection in self._connections.values():
                if connection.overdue(now):
                    _end(connection.socket)

    def state_of(self, request: socket.socket) -> Connection:
        """Return the book-keeping of a connection."""
        return self._connections.get(request) or Connection(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at debug level: a client that goes away, or was made to, is nobody's fault here."""
        log.debug("fastapi-headroom: a connection to the exporter failed", exc_info=True)

    def health(self) -> dict[str, object]:
        """Return what /healthz tells; it waits for no scrape."""
        return {
            "status": "ok",
            "directory": str(self.directory),
            "directory_present": os.path.isdir(self.directory),  # noqa: PTH112 - Path's raises without rights
            "slots_alive": slots_alive(self.directory),
            "last_scrape": self.scraper.last,
        }


class _NotListeningError(Exception):
    """The listening socket was closed, by stop() or by code that closes what is not its own."""


def _end(connection: socket.socket) -> None:
    """Wake the thread that waits for a socket: it sees the end and cleans up."""
    try:
        # not SSLSocket's own, which would have its thread go on without TLS
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass


def _not_listening(host: str, port: int, error: OSError) -> HeadroomError:
    where = f"{host or '*'}:{port}"
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"port {where} is in use: stop what listens there, or choose another with HEADROOM_PORT or --port"
        )
    return HeadroomError(
        f"cannot listen on {where} ({error.strerror or error}): choose an address of this machine with "
        "HEADROOM_HOST or --host, and a port above 1023"
    )
