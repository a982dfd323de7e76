"""The series of requests, resolved once per label set, so that a request costs one dictionary look-up.

Every label value is bounded here: methods and statuses to those that exist, exception types by a cap, and
routes to templates, which the caller owes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.ledger import ON_LOOP, OTHER, STAGES
from fastapi_headroom.probes.names import OTHER as OTHER_VALUE
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.store.writer import Writer

_KNOWN: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
METHODS: Final = {method: method for method in _KNOWN}
"""Methods that are label values as they are; all others share ``_OTHER``."""
_BODYLESS: Final = frozenset({"204", "304"})
MAX_ERROR_TYPES: Final = 50
"""Distinct values of ``error_type``; further ones share ``_OTHER``."""
CLOSE_REASONS: Final = ("normal", "abnormal", "error", "rejected")

Write = Callable[[float], None]


class RouteSeries:
    """What is kept per route, whatever the method and the status."""

    __slots__ = (
        "_route",
        "_writer",
        "compressible",
        "disconnect",
        "first_byte",
        "latency",
        "loop_hold",
        "queries",
        "rows",
        "stages",
    )

    def __init__(self, writer: Writer, route: str) -> None:
        self._writer = writer
        self._route = route
        self.latency: Write = writer.histogram(catalog.REQUEST_LATENCY, route).observe
        self.first_byte: Write = writer.histogram(catalog.TIME_TO_FIRST_BYTE, route).observe
        self.loop_hold: Write = writer.histogram(catalog.LOOP_HOLD, route).observe
        self.queries: Write = writer.histogram(catalog.REQUEST_QUERIES, route).observe
        self.rows: Write | None = None
        self.disconnect: Write = writer.counter(catalog.REQUEST_DISCONNECTS, route).inc
        self.compressible: Write = writer.counter(catalog.COMPRESSIBLE_BYTES, route).inc
        self.stages: list[Write | None] = [None] * len(STAGES)
        """The counters of the stages in which the route has had time."""
        self.make_stage(ON_LOOP)
        self.make_stage(OTHER)

    def make_stage(self, stage: int) -> Write:
        """Return the counter of a stage, made when the route first has time there."""
        write = self.stages[stage] = self._writer.counter(catalog.REQUEST_STAGE, self._route, STAGES[stage]).inc
        return write

    def make_rows(self) -> Write:
        """Return the histogram of rows, made when a driver first tells a number."""
        self.rows = self._writer.histogram(catalog.REQUEST_ROWS, self._route).observe
        return self.rows

    def lifetime(self, kind: str) -> Write:
        """Return the histogram of stream lifetimes: kind sse or stream."""
        return self._writer.histogram(catalog.STREAM_LIFETIME, self._route, kind).observe


class ResponseSeries:
    """What is kept per method, route, status and error type, and the way to the route's series."""

    __slots__ = ("_histogram", "_writer", "duration", "labels", "outcome", "request_size", "response_size", "route")

    def __init__(self, writer: Writer, route: RouteSeries, labels: tuple[str, str, str, str], outcome: str) -> None:
        method, template, status, _ = self.labels = labels
        self._writer = writer
        self.route = route
        self.duration: Write | None = None
        self.outcome: Write = writer.counter(catalog.REQUESTS, template, outcome).inc
        size: Write = writer.histogram(catalog.RESPONSE_BODY_SIZE, method, template).observe
        # Apps hand over a body here too, and servers drop it.
        self.response_size: Write = (lambda _: size(0.0)) if method == "HEAD" or status in _BODYLESS else size
        self.request_size: Write | None = None

    def make_duration(self) -> Write:
        """Return the histogram of durations, made with the first one: a route that only streams has none."""
        self._histogram = self._writer.histogram(catalog.REQUEST_DURATION, *self.labels)
        self.duration = self._histogram.observe
        return self.duration

    def exemplar(self, duration: float, trace: tuple[int, int]) -> None:
        """Keep the trace of a request whose duration was observed as an example of such requests."""
        self._writer.exemplar(self._histogram, duration, *trace)

    def make_request_size(self) -> Write:
        """Return the histogram of request bodies, made with the first body."""
        self.request_size = self._writer.histogram(catalog.REQUEST_BODY_SIZE, *self.labels[:2]).observe
        return self.request_size


class WebSocketSeries:
    """What is kept per WebSocket route."""

    __slots__ = ("closed", "ended", "lifetime", "opened", "received", "sent")

    def __init__(self, writer: Writer, route: str) -> None:
        connections = writer.gauge(catalog.WEBSOCKET_CONNECTIONS, route)
        self.opened: Callable[[], None] = connections.inc
        self.closed: Callable[[], None] = connections.dec
        self.received: Callable[[], None] = writer.counter(catalog.WEBSOCKET_MESSAGES, route, "received").inc
        self.sent: Callable[[], None] = writer.counter(catalog.WEBSOCKET_MESSAGES, route, "sent").inc
        self.lifetime: Write = writer.histogram(catalog.STREAM_LIFETIME, route, "websocket").observe
        self.ended: dict[str, Callable[[], None]] = {
            reason: writer.counter(catalog.WEBSOCKET_CLOSES, route, reason).inc for reason in CLOSE_REASONS
        }


class Table:
    """All series of the request probe in one process."""

    def __init__(self, writer: Writer, on_new_route: Callable[[], None]) -> None:
        self._writer = writer
        self._on_new_route = on_new_route
        self._announced: set[str] = set()
        self._routes: dict[str, RouteSeries] = {}
        self._websockets: dict[str, WebSocketSeries] = {}
        self._bounded = BoundedNames(MAX_ERROR_TYPES)
        self.responses: dict[tuple[str, str, int, str], ResponseSeries] = {}
        """By method, route, status and error type as the request has them."""
        self.count: Callable[[], None] = writer.counter(catalog.WORKER_REQUESTS, writer.worker).inc
        self.active: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        """By method: what raises and what lowers the number of requests in flight."""

    def make_active(self, method: str) -> tuple[Callable[[], None], Callable[[], None]]:
        """Add a method to ``active``."""
        gauge = self._writer.gauge(catalog.REQUESTS_ACTIVE, method)
        pair = self.active[method] = (gauge.inc, gauge.dec)
        return pair

    def announce(self, route: str) -> None:
        """Make what objectives divide by, at 0. The rest comes with the first request: many routes never get one."""
        if route not in self._announced:
            self._announced.add(route)
            for outcome in ("ok", "client_error", "error"):
                self._writer.counter(catalog.REQUESTS, route, outcome)

    def add_route(self, route: str) -> RouteSeries:
        """Return a route's series."""
        series = self._routes.get(route)
        if series is None:
            if route not in self._announced:
                self._on_new_route()  # routes were added since the last look: their siblings start at 0 too
                self.announce(route)
            series = self._routes[route] = RouteSeries(self._writer, route)
        return series

    def failure(self, route: str) -> Write:
        """Return the counter of a route's failed requests."""
        self.add_route(route)
        return self._writer.counter(catalog.REQUESTS, route, "error").inc

    def websocket(self, route: str) -> WebSocketSeries:
        """Return a WebSocket route's series."""
        series = self._websockets.get(route)
        if series is None:
            series = self._websockets[route] = WebSocketSeries(self._writer, route)
        return series

    def add_response(self, method: str, route: str, status: int, error_type: str) -> ResponseSeries:
        """Resolve a label set that is new here."""
        standard = isinstance(status, int) and 100 <= status <= 599
        bounded = self._bounded(error_type) if error_type else ""
        outcome = "error" if error_type else "client_error" if standard and status >= 400 else "ok"
        labels = (method, route, str(status) if standard else OTHER_VALUE, bounded)
        key = (method, route, status if standard else 0, bounded)
        series = self.responses.get(key)
        if series is None:
            series = self.responses[key] = ResponseSeries(self._writer, self.add_route(route), labels, outcome)
        return series
