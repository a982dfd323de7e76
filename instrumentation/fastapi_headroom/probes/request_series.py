"""The series of requests, resolved once per label set, so that a request costs one dictionary look-up.

Every label value is bounded here: methods and statuses to those that exist, exception types by a cap, and
routes to templates, which the caller owes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import compress
from typing import Final

from fastapi_headroom import catalog
from fastapi_headroom.ledger import ACCEPT_QUEUE, ON_LOOP, OTHER, STAGES, Ledger
from fastapi_headroom.probes.cache_control import CachePolicies
from fastapi_headroom.probes.names import OTHER as OTHER_VALUE
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.request_place import Place, find_place
from fastapi_headroom.store.writer import MOVES, Counter, Gauge, Histogram, Writer, gil_enabled

_KNOWN: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
METHODS: Final = {method: method for method in _KNOWN}
"""Methods that are label values as they are; all others share ``_OTHER``."""
_BODYLESS: Final = frozenset({"204", "304"})
_KEPT_METHODS: Final = ("GET", "HEAD")
_KEPT_STATUSES: Final = ("2", "3")
MAX_ERROR_TYPES: Final = 50
"""Distinct values of ``error_type``; further ones share ``_OTHER``."""
CLOSE_REASONS: Final = ("normal", "abnormal", "error", "rejected")
_ALL_STAGES: Final = range(len(STAGES))
_TIME_BOUNDS: Final = catalog.REQUEST_DURATION.buckets
_HOLD_BOUNDS: Final = catalog.LOOP_HOLD.buckets
_QUERY_BOUNDS: Final = catalog.REQUEST_QUERIES.buckets
_SIZE_BOUNDS: Final = catalog.RESPONSE_BODY_SIZE.buckets
_SHORT: Final = _TIME_BOUNDS[0]
_AT_ONCE, _SOON = _HOLD_BOUNDS[:2]
_SMALL: Final = _SIZE_BOUNDS[0]

Write = Callable[[float], None]


class RouteSeries:
    """What is kept per route, whatever the method and the status."""

    __slots__ = (
        "_route",
        "_writer",
        "cache_policies",
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
        self.latency: Histogram = writer.histogram(catalog.REQUEST_LATENCY, route)
        self.first_byte: Histogram = writer.histogram(catalog.TIME_TO_FIRST_BYTE, route)
        self.loop_hold: Histogram = writer.histogram(catalog.LOOP_HOLD, route)
        self.queries: Histogram = writer.histogram(catalog.REQUEST_QUERIES, route)
        self.rows: Write | None = None
        self.disconnect: Write = writer.counter(catalog.REQUEST_DISCONNECTS, route).inc
        self.compressible: Write = writer.counter(catalog.COMPRESSIBLE_BYTES, route).inc
        self.cache_policies = CachePolicies(writer, route)
        self.stages: list[Counter | None] = [None] * len(STAGES)
        """The counters of the stages in which the route has had time."""
        self.make_stage(ON_LOOP)
        self.make_stage(OTHER)

    def make_stage(self, stage: int) -> Counter:
        """Return the counter of a stage, made when the route first has time there."""
        counter = self.stages[stage] = self._writer.counter(catalog.REQUEST_STAGE, self._route, STAGES[stage])
        return counter

    def make_rows(self) -> Write:
        """Return the histogram of rows, made when a driver first tells a number."""
        self.rows = self._writer.histogram(catalog.REQUEST_ROWS, self._route).observe
        return self.rows

    def lifetime(self, kind: str) -> Write:
        """Return the histogram of stream lifetimes: kind sse or stream."""
        return self._writer.histogram(catalog.STREAM_LIFETIME, self._route, kind).observe


class ResponseSeries:
    """What is kept per method, route, status and error type, and the way to the route's series."""

    __slots__ = ("_bodyless", "_handles", "_looked", "_place", "_requests", "_writer", "labels", "outcome", "policies",
                 "request_size", "response_size", "route")  # fmt: skip

    def __init__(self, writer: Writer, route: RouteSeries, labels: tuple[str, str, str, str], outcome: str) -> None:
        method, template, status, _ = self.labels = labels
        self._writer = writer
        self.route = route
        self.outcome: Counter = writer.counter(catalog.REQUESTS, template, outcome)
        self._requests = writer.counter(catalog.WORKER_REQUESTS, writer.worker)
        self.response_size: Histogram = writer.histogram(catalog.RESPONSE_BODY_SIZE, method, template)
        # Apps hand over a body here too, and servers drop it.
        self._bodyless = method == "HEAD" or status in _BODYLESS
        self.policies: CachePolicies | None = None
        """Set where a client or a proxy may keep the response."""
        if method in _KEPT_METHODS and status[0] in _KEPT_STATUSES:
            self.policies = route.cache_policies
        self.request_size: Write | None = None
        self._handles: tuple[Histogram, Histogram, Histogram, Histogram, Histogram, Histogram] | None = None
        self._place: Place | None = None
        self._looked = -1
        """The number of moves at which ``_place`` was looked for, in vain or not."""

    def write(self, ledger: Ledger, duration: float, first_byte: float, sent: int) -> None:
        """Write a request that was answered, and whose response was no stream; times in seconds, size in bytes.

        Its outcome, and what few requests have, is written apart. This is what ``observe`` and ``inc`` of each handle
        would do, in one go: the calls, and asking each handle where it is, would cost as much again.
        """
        seconds = ledger.seconds
        hold, queries, accepted = ledger.longest_step, ledger.queries, seconds[ACCEPT_QUEUE]
        if self._bodyless:
            sent = 0
        # The bounds of the three times are the same, so a short duration tells the bucket of all.
        if duration <= _SHORT and not accepted:
            cell_d = cell_l = cell_f = 0
        else:
            cell_d = bisect_left(_TIME_BOUNDS, duration)
            cell_l = bisect_left(_TIME_BOUNDS, accepted + duration) if accepted else cell_d
            cell_f = bisect_left(_TIME_BOUNDS, first_byte) if cell_d else 0
        cell_h = bisect_left(_HOLD_BOUNDS, hold) if hold > _SOON else 1 if hold > _AT_ONCE else 0
        cell_q = bisect_left(_QUERY_BOUNDS, queries) if queries else 0
        cell_s = bisect_left(_SIZE_BOUNDS, sent) if sent > _SMALL else 0
        # No call and no loop from here on: one uninterrupted step, also while handles are sent elsewhere.
        place = self._place
        if place is None or place.moves != MOVES.count:
            self._write_and_look(ledger, duration, first_byte, sent)
            return
        (view, mark, mark_2, mark_3, mark_4, durations, duration_sum, latencies, latency_sum, first_bytes,
         first_byte_sum, loop_holds, loop_hold_sum, counts, count_sum, sizes, size_sum,
         counters, requests, on_loop) = place.where  # fmt: skip
        view[mark] = 1.0
        if mark_2:
            view[mark_2] = 1.0
            if mark_3:
                view[mark_3] = 1.0
                view[mark_4] = 1.0
        # Not as `view[index] += 1.0`, which moves its operands about on the stack and takes two thirds longer.
        cell = durations[cell_d]
        view[cell] = view[cell] + 1.0
        view[duration_sum] = view[duration_sum] + duration
        cell = latencies[cell_l]
        view[cell] = view[cell] + 1.0
        view[latency_sum] = view[latency_sum] + accepted + duration
        cell = first_bytes[cell_f]
        view[cell] = view[cell] + 1.0
        view[first_byte_sum] = view[first_byte_sum] + first_byte
        cell = loop_holds[cell_h]
        view[cell] = view[cell] + 1.0
        view[loop_hold_sum] = view[loop_hold_sum] + hold
        cell = counts[cell_q]
        view[cell] = view[cell] + 1.0
        if queries:
            view[count_sum] = view[count_sum] + queries
        cell = sizes[cell_s]
        view[cell] = view[cell] + 1.0
        view[size_sum] = view[size_sum] + sent
        counters[requests] = counters[requests] + 1.0
        counters[on_loop] = counters[on_loop] + seconds[ON_LOOP]
        if ledger.waited or seconds[OTHER]:
            self._write_stages(seconds)

    def _write_and_look(self, ledger: Ledger, duration: float, first_byte: float, sent: int) -> None:
        """Do what ``write`` does through the handles, and look for the next one where they are by now."""
        moves = MOVES.count  # first: what moves while we look is looked for again
        if self._looked != moves:
            self._looked = moves
            on_loop = self.route.stages[ON_LOOP] or self.route.make_stage(ON_LOOP)
            self._place = find_place(moves, self._handles or self._make_handles(), self._requests, on_loop)
        self.write_apart(ledger, duration, first_byte, sent)

    def _write_stages(self, seconds: list[float]) -> None:
        """Write the stages besides ``on_loop``."""
        stages = self.route.stages
        for stage in compress(_ALL_STAGES, seconds):  # those that are not 0
            if stage != ON_LOOP:
                (stages[stage] or self.route.make_stage(stage)).inc(seconds[stage])

    def _make_handles(self) -> tuple[Histogram, Histogram, Histogram, Histogram, Histogram, Histogram]:
        """Make the histogram of durations, with the first one: a route that only streams has none."""
        route = self.route
        made = self._handles = (
            self._writer.histogram(catalog.REQUEST_DURATION, *self.labels),
            route.latency,
            route.first_byte,
            route.loop_hold,
            route.queries,
            self.response_size,
        )
        return made

    def write_apart(self, ledger: Ledger, duration: float | None, first_byte: float | None, sent: int) -> None:
        """Write the same through each handle by itself; None for what is not to be written.

        A stream has no duration, latency and stages; a first byte was written before, or never came.
        """
        route, seconds = self.route, ledger.seconds
        if duration is not None:
            (self._handles or self._make_handles())[0].observe(duration)
            route.latency.observe(seconds[ACCEPT_QUEUE] + duration)
            for stage in compress(_ALL_STAGES, seconds):
                (route.stages[stage] or route.make_stage(stage)).inc(seconds[stage])
        if first_byte is not None:
            route.first_byte.observe(first_byte)
        route.loop_hold.observe(ledger.longest_step)
        route.queries.observe(ledger.queries)
        self.response_size.observe(0 if self._bodyless else sent)
        self._requests.inc()

    def exemplar(self, duration: float, trace: tuple[int, int]) -> None:
        """Keep the trace of a request whose duration was observed as an example of such requests."""
        self._writer.exemplar((self._handles or self._make_handles())[0], duration, *trace)

    def make_request_size(self) -> Write:
        """Return the histogram of request bodies, made with the first body."""
        self.request_size = self._writer.histogram(catalog.REQUEST_BODY_SIZE, *self.labels[:2]).observe
        return self.request_size


class LockedResponseSeries(ResponseSeries):
    """The same for builds without the GIL, where each handle takes the lock."""

    __slots__ = ()
    write = ResponseSeries.write_apart


_RESPONSE_SERIES: Final = ResponseSeries if gil_enabled() else LockedResponseSeries


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
        writer.counter(catalog.WORKER_REQUESTS, writer.worker)  # there from the start
        self.active: dict[str, Gauge] = {}
        """The number of requests in flight, by method."""

    def make_active(self, method: str) -> Gauge:
        """Add a method to ``active``."""
        gauge = self.active[method] = self._writer.gauge(catalog.REQUESTS_ACTIVE, method)
        return gauge

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
            series = self.responses[key] = _RESPONSE_SERIES(self._writer, self.add_route(route), labels, outcome)
        return series
