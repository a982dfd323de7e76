"""Calls to other services: how long they take by host, and the ledger's stage ``http_client``.

httpx (sync and async), aiohttp and requests are found by themselves, imported before or after. The time ends with the
last byte of the body where the library reads it (httpx and requests without streaming), else with the headers.
A redirect that the library follows is part of the call. Of the address only the host's name becomes a label.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from threading import get_ident
from time import perf_counter
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.ledger import HTTP_CLIENT, Ledger, current
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.request_series import METHODS
from fastapi_headroom.store.writer import Histogram, Writer

MAX_HOSTS: Final = 30
"""Hosts that get series of their own; further ones are ``_OTHER``."""
MAX_ERROR_TYPES: Final = 30
_IN_PROCESS: Final = frozenset({"ASGITransport", "WSGITransport", "MockTransport", "_TestClientTransport"})
"""Transports of httpx that call no other service."""


class HttpClientProbe:
    """Measures the HTTP clients of the process. Switched with the request probe, whose stem it has."""

    name: ClassVar[str] = "request"
    metrics: ClassVar[tuple[Metric, ...]] = (catalog.HTTP_CLIENT_DURATION,)

    def __init__(self) -> None:
        self.guard = Guard(self.name)
        self._patches = Patches()
        self._writer: Writer | None = None
        self._attached: set[str] = set()
        self._inside: set[int] = set()
        self._handles: dict[tuple[str, str, int, str], Histogram] = {}
        self._hosts = BoundedNames(MAX_HOSTS)
        self._errors = BoundedNames(MAX_ERROR_TYPES)

    def bind(self, writer: Writer) -> None:
        """Resolve handles and wrap the clients that have been imported; ``sample`` wraps those that come later."""
        self._handles = {}
        self._inside = set()
        self._hosts = BoundedNames(MAX_HOSTS)
        self._errors = BoundedNames(MAX_ERROR_TYPES)
        self._writer = writer
        self.sample()

    def sample(self) -> None:
        """Wrap the libraries that were imported since."""
        if self._writer is None:
            return
        places: tuple[tuple[str, str, str, Callable[[Any], Any]], ...] = (
            ("httpx", "AsyncClient", "send", self._wrap_httpx_async),
            ("httpx", "Client", "send", self._wrap_httpx),
            ("aiohttp", "ClientSession", "_request", self._wrap_aiohttp),
            ("aiohttp", "ClientResponse", "read", self._wrap_aiohttp_read),
            ("requests", "Session", "send", self._wrap_requests),
        )
        for module, cls, attribute, make in places:
            name = f"{module}.{cls}.{attribute}"
            if module in sys.modules and name not in self._attached:
                owner = getattr(sys.modules[module], cls, None)  # None while it is half imported
                if owner is not None:
                    self._attached.add(name)  # first: a version without that method is an error once, not each second
                    self._patches.wrap(owner, attribute, make)

    def close(self) -> None:
        """Put every client back. Idempotent."""
        self._writer = None
        self._patches.restore()
        self._attached.clear()

    def _wrap_httpx_async(self, original: Any) -> Any:
        @wraps(original)
        async def send(client: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            if self._writer is None or in_process(client):
                return await original(client, request, *args, **kwargs)
            call = Call()
            try:
                response = await original(client, request, *args, **kwargs)
                call.status = response.status_code
                return response
            except BaseException as error:
                call.error = type(error).__name__
                raise
            finally:
                self._record(call, request.method, request.url.host)

        return send

    def _wrap_httpx(self, original: Any) -> Any:
        @wraps(original)
        def send(client: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            if self._writer is None or in_process(client):
                return original(client, request, *args, **kwargs)
            call = Call()
            try:
                response = original(client, request, *args, **kwargs)
                call.status = response.status_code
                return response
            except BaseException as error:
                call.error = type(error).__name__
                raise
            finally:
                self._record(call, request.method, request.url.host)

        return send

    def _wrap_aiohttp(self, original: Any) -> Any:
        @wraps(original)
        async def request(session: Any, method: str, str_or_url: Any, **kwargs: Any) -> Any:
            if self._writer is None:
                return await original(session, method, str_or_url, **kwargs)
            call = Call()
            try:
                response = await original(session, method, str_or_url, **kwargs)
                call.status = response.status
                return response
            except BaseException as error:
                # raise_for_status is an answer, too
                call.status = getattr(error, "status", 0) or 0
                call.error = type(error).__name__
                raise
            finally:
                self._record(call, method, lambda: session._build_url(str_or_url).host)

        return request

    def _wrap_aiohttp_read(self, original: Any) -> Any:
        """Let the reading of a body be time of the stage; the call itself ended with the headers."""

        @wraps(original)
        async def read(response: Any) -> Any:
            ledger = None if self._writer is None else current.get()
            if ledger is None:
                return await original(response)
            ledger.enter(HTTP_CLIENT)
            try:
                return await original(response)
            finally:
                ledger.leave(HTTP_CLIENT)

        return read

    def _wrap_requests(self, original: Any) -> Any:
        @wraps(original)
        def send(session: Any, request: Any, **kwargs: Any) -> Any:
            me, inside = get_ident(), self._inside
            if self._writer is None or me in inside:  # it calls itself for each redirect
                return original(session, request, **kwargs)
            inside.add(me)
            call = Call()
            try:
                response = original(session, request, **kwargs)
                call.status = response.status_code
                return response
            except BaseException as error:
                call.error = type(error).__name__
                raise
            finally:
                inside.discard(me)
                self._record(call, request.method, lambda: urlsplit(request.url).hostname)

        return send

    def _record(self, call: Call, method: str | None, host: str | Callable[[], str | None]) -> None:
        elapsed = call.end()
        try:
            name = (host if isinstance(host, str) else host()) or OTHER
            # The convention's error type of an answer is its status.
            error = call.error or (str(call.status) if call.status >= 400 else "")
            key = (METHODS.get((method or "").upper(), OTHER), name, call.status, error)
            handle = self._handles.get(key)
            if handle is None:
                if self._writer is None:
                    return  # closed while the call was on its way
                handle = self._make(self._writer, *key)
            handle.observe(elapsed)
        except Exception as failure:
            self.guard.failed(failure)

    def _make(self, writer: Writer, method: str, host: str, status: int, error: str) -> Histogram:
        folded = self._hosts(host)
        # Statuses outside the registered ranges are not worth a series each.
        code = "" if not status else str(status) if 100 <= status < 600 else OTHER
        bounded = code if error == str(status) else self._errors(error) if error else ""
        handle = writer.histogram(catalog.HTTP_CLIENT_DURATION, method, folded, code, bounded)
        if folded == host:  # hosts without end are looked up anew rather than remembered
            self._handles[method, host, status, error] = handle
        return handle


class Call:
    """One call: begun when it is made."""

    __slots__ = ("_ledger", "_started", "error", "status")

    def __init__(self) -> None:
        self.status = 0
        self.error = ""
        self._ledger: Ledger | None = current.get()
        if self._ledger is not None:
            self._ledger.enter(HTTP_CLIENT)
        self._started = perf_counter()

    def end(self) -> float:
        """Leave the stage and return the seconds that the call took."""
        elapsed = perf_counter() - self._started
        if self._ledger is not None:
            self._ledger.leave(HTTP_CLIENT)
        return elapsed


def in_process(client: Any) -> bool:
    """Return whether a client of httpx calls an app of this process, as test clients do."""
    return type(getattr(client, "_transport", None)).__name__ in _IN_PROCESS
