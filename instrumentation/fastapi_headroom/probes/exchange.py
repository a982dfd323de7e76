"""One request and its response: what passes between the server and the app, seen from outside the app.

Duration ends when the last body message has been sent. A response is a *stream* when it is
``text/event-stream``, or has no Content-Length and came in several messages over more than STREAM_AFTER seconds;
streams stay out of the duration and latency histograms and of the ledger's stages. A compressed or rendered
response that merely comes in pieces is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any, Final

from starlette.requests import ClientDisconnect

from fastapi_headroom.ledger import Ledger, in_flight
from fastapi_headroom.probes import blocks
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.cache_control import NAME_LENGTH
from fastapi_headroom.probes.compressible import SMALLEST, compressible
from fastapi_headroom.probes.headers import Headers, header, length
from fastapi_headroom.probes.request_series import ResponseSeries, Table
from fastapi_headroom.store.writer import gil_enabled
from fastapi_headroom.tracing import spans

STREAM_AFTER: Final = 1.0
"""Seconds between the start of a response and its end from which on it is a stream, see above."""
UNMATCHED: Final = "_unmatched"
"""Route of requests that reached no route: unknown paths, and what a middleware answered."""
REDIRECT: Final = "_redirect"
PREFLIGHT: Final = "_preflight"
CLIENT_CLOSED_REQUEST: Final = 499
"""Status of a request whose client went away before there was a response (the convention of nginx)."""
INCOMPLETE: Final = "IncompleteResponse"
"""Error type of an app that returned in the middle of its response."""
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH", "QUERY"})
_FILES: Final = frozenset({"http.response.pathsend", "http.response.zerocopysend"})
"""Messages with which an app leaves a file to the server to send (extensions of the ASGI specification)."""
_DIGITS: Final = 15
"""Digits of a Content-Length that is believed: less than 1 PB."""
_UNREAD_DIGITS: Final = 10
"""The same of a request whose body nobody read: a client can write what it likes."""

_IN_PLACE: Final = gil_enabled()
"""Whether ``inc`` and ``dec`` are written out where every request passes: their calls cost more than what they do."""

Message = MutableMapping[str, Any]


class Exchange:
    """Stands between the server and the app for one HTTP request."""

    __slots__ = (
        "_active",
        "_guard",
        "_headers",
        "_receive",
        "_received",
        "_scope",
        "_send",
        "_series",
        "_table",
        "began",
        "counted",
        "disconnected",
        "duration",
        "ledger",
        "recorded",
        "sent",
        "several",
        "status",
    )

    def __init__(
        self,
        table: Table,
        guard: Guard,
        ledger: Ledger,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self._table = table
        self._guard = guard
        self._scope = scope
        self._receive = receive
        self._send = send
        self._received = 0
        self.ledger = ledger
        self.status = 0
        self._headers: Headers = ()
        """The response's."""
        self.began = 0.0
        """When the response started; 0 before."""
        self.sent = 0
        self.several = False
        self.disconnected = False
        self.duration = 0.0
        self.counted = False
        self.recorded = False
        self._series: ResponseSeries | None = None
        active = self._active = table.active.get(ledger.method) or table.make_active(ledger.method)
        if _IN_PLACE:
            active.view[active.index] += 1.0
        else:
            active.inc()
        in_flight.add(ledger)

    async def receive(self) -> Message:
        """Hand a message to the app and count its bytes."""
        message = await self._receive()
        try:
            if message["type"] == "http.request":
                self._received += len(message.get("body", b""))
            elif not self.ledger.finished:  # after the response everybody may go
                self.disconnected = True
        except Exception as error:
            self._guard.failed(error)
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Hand a message to the server. Returns its coroutine: only body messages need a frame of ours."""
        try:
            kind = message["type"]
        except Exception:  # whatever it is, the server is to say so
            return self._send(message)
        if kind == "http.response.body":
            return self._send_body(message)
        if kind == "http.response.start":
            self.began = perf_counter()
            self.status = message.get("status", 0)
            headers = message.get("headers")
            if type(headers) is list:  # any other iterable is for the server: it may be read once only
                self._headers = headers
        elif kind in _FILES:
            return self._send_body(message)
        return self._send(message)

    async def _send_body(self, message: Message) -> None:
        last = not message.get("more_body", False)
        ledger, status = self.ledger, self.status
        if last and not self.counted and not ledger.finished:
            try:  # before the last byte leaves: who got an answer is counted, be the process killed next
                if status < 500:
                    key = (ledger.method, ledger.route or self.route(), status, "")
                    series = self._series = self._table.responses.get(key) or self._table.add_response(*key)
                    outcome = series.outcome
                    if _IN_PLACE:
                        outcome.view[outcome.index] += 1.0
                    else:
                        outcome.inc()
                    self.counted = True
                elif not self.disconnected:  # else it may be an error for the sole reason that the client went
                    self._table.failure(self.route())(1.0)  # of which exception it is comes later
                    self.counted = True
            except Exception as error:
                self._guard.failed(error)
        try:
            await self._send(message)
        except OSError:  # how servers tell, since version 2.4 of the ASGI specification, that the client has gone
            self.disconnected = True
            raise
        try:
            body = message.get("body")
            self.sent += self._size_of_file(message) if body is None else len(body)
            if last:
                self.complete()
            elif not self.several and message["type"] not in _FILES:
                self.several = True
                self._stream_begins()
        except Exception as error:
            self._guard.failed(error)

    def _size_of_file(self, message: Message) -> int:
        if message["type"] not in _FILES:
            return 0  # a body may be left out
        size: int = message.get("count") or length(self._headers, _DIGITS)
        return size

    def _stream_begins(self) -> None:
        # An event stream may stay open for hours: its first byte is reported now.
        if self._is_event_stream():
            self._table.add_route(self.route()).first_byte.observe(self.began - self.ledger.started)

    def complete(self) -> None:
        """Close the books: the last byte is out. A response of 5xx waits for its exception, which comes next."""
        if self.ledger.finished:
            return
        self.duration = self.ledger.finish(perf_counter())
        active = self._active
        if _IN_PLACE:
            active.view[active.index] -= 1.0
        else:
            active.dec()
        if spans.active and self.ledger.context is None and spans.UNSAMPLED not in self._scope:
            self.ledger.trace = spans.sampled()  # the server span is still open: the last byte passes through it
            if self.ledger.trace is not None:
                blocks.tell_span(self.ledger)
        if self.status < 500:
            self.recorded = True
            self.record("")

    def exit(self, error: BaseException | None) -> None:
        """Record a request that failed or was left unanswered; ``error`` is what the app raised. Never raises."""
        try:
            if self.recorded:
                return  # what comes after a good response, such as a failed background task, is not the request's
            whole = self.ledger.finished
            if not whole:
                self.duration = self.ledger.finish(perf_counter())
                self._active.dec()
                if (
                    self.began and not self.several
                ):  # what is left open after its start: a stream's first event never came
                    self.several = True
                    self._stream_begins()
            self.recorded = True
            self.record(self._error_type(error, whole))
        except Exception as failure:
            self._guard.failed(failure)

    def _error_type(self, error: BaseException | None, whole: bool) -> str:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, ClientDisconnect):
            self.disconnected = True
        if self.disconnected and not whole and (error is None or not isinstance(error, Exception | SystemExit)):
            return self._gone()
        if isinstance(error, ClientDisconnect | OSError) and self.disconnected:
            return self._gone()
        if not self.status:
            self.status = 500  # what servers answer in the app's place
        if error is not None:
            return type(error).__name__
        return str(self.status) if whole or not self.began else INCOMPLETE

    def _gone(self) -> str:
        if not 0 < self.status < 500:  # 5xx: the answer that a middleware gave in place of one, to nobody
            self.status = CLIENT_CLOSED_REQUEST
        return ""

    def route(self) -> str:
        """Return the template, or the value that requests without a route share."""
        route = self.ledger.route
        if route:
            return route
        if 300 < self.status < 400:
            return REDIRECT
        if self.ledger.method == "OPTIONS" and header(self._scope["headers"], b"access-control-request-method"):
            return PREFLIGHT
        return UNMATCHED

    def record(self, error_type: str) -> None:
        """Write the request to the store."""
        ledger = self.ledger
        series = self._series
        if series is None or error_type:
            key = (ledger.method, ledger.route or self.route(), self.status, error_type)
            series = self._table.responses.get(key) or self._table.add_response(*key)
        duration, began, sent = self.duration, self.began, self.sent
        kind = self._stream_kind() if self.several or duration > STREAM_AFTER else ""
        if not kind and began:
            series.write(ledger, duration, began - ledger.started, sent)
        else:
            first_byte = began - ledger.started if began and (kind != "sse" or not self.several) else None
            series.write_apart(ledger, None if kind else duration, first_byte, sent)
            if kind:
                series.route.lifetime(kind)(ledger.started + duration - began)
        if ledger.trace is not None and not kind:
            series.exemplar(duration, ledger.trace)
        if ledger.rows >= 0:
            (series.route.rows or series.route.make_rows())(ledger.rows)
        received = self._received or (self._announced() if ledger.method in _WITH_BODY else 0)
        if received:
            (series.request_size or series.make_request_size())(received)
        if not self.counted:
            series.outcome.inc()
        if self.disconnected:
            series.route.disconnect(1.0)
        if series.policies is not None:
            for name, _ in self._headers:
                if len(name) == NAME_LENGTH:  # what has another length need not be looked at there
                    series.policies.note(self._headers)
                    break
        if sent > SMALLEST and ledger.method != "HEAD" and compressible(self._scope["headers"], self._headers):
            series.route.compressible(sent)

    def _announced(self) -> int:
        # A body that nobody read.
        return 0 if self.disconnected else length(self._scope["headers"], _UNREAD_DIGITS)

    def _stream_kind(self) -> str:
        if not self.began:
            return ""
        if self._is_event_stream():
            return "sse"
        lifetime = self.ledger.started + self.duration - self.began
        return "stream" if lifetime > STREAM_AFTER and header(self._headers, b"content-length") is None else ""

    def _is_event_stream(self) -> bool:
        return (header(self._headers, b"content-type") or b"").lower().startswith(b"text/event-stream")
