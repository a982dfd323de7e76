"""The series of the pools that are not SQLAlchemy's, with their handles resolved once."""

from __future__ import annotations

from typing import NamedTuple

from fastapi_headroom import catalog
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.pool_series import OUTSIDE, UNMATCHED
from fastapi_headroom.store.writer import Counter, Gauge, Histogram, Writer


class Reading(NamedTuple):
    """What a pool says of itself at one moment."""

    used: int
    idle: int
    """Connections that are open and lie ready."""
    maximum: int | None = None
    """None where the pool has no limit."""
    idle_max: int | None = None
    """None where the pool keeps as many as it may open."""
    broken: int = 0
    """Connections that the pool itself counted as broken since it was made."""


class RouteSeries:
    """The counters of one pool and one route. What runs on a connection is not seen, so there is no idle hold."""

    __slots__ = ("_labels", "_writer", "hold", "wait")

    def __init__(self, writer: Writer, pool: str, route: str) -> None:
        self._writer, self._labels = writer, (pool, route)
        self.wait: Counter = writer.counter(catalog.POOL_WAIT_BY_ROUTE, pool, route)
        self.hold: Counter = writer.counter(catalog.POOL_HOLD_BY_ROUTE, pool, route)

    def long_holds(self) -> Counter:
        """Return the counter of connections held beyond the threshold."""
        return self._writer.counter(catalog.POOL_LONG_HOLDS, *self._labels)


class MeterSeries:
    """The series of one pool name. Several pools may share it; the gauges are their sum."""

    __slots__ = (
        "_invalidations",
        "_wait",
        "_writer",
        "create",
        "idle",
        "idle_max",
        "max",
        "name",
        "pending",
        "routes",
        "timeouts",
        "use",
        "used",
    )

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer = writer
        self.name = name
        self.create: Histogram = writer.histogram(catalog.POOL_CREATE, name)
        self.use: Histogram = writer.histogram(catalog.POOL_USE, name)
        self.timeouts: Counter = writer.counter(catalog.POOL_TIMEOUTS, name)
        self.used: Gauge = writer.gauge(catalog.POOL_COUNT, name, "used")
        self.idle: Gauge = writer.gauge(catalog.POOL_COUNT, name, "idle")
        self.pending: Gauge | None = None
        self.max: Gauge | None = None
        self.idle_max: Gauge | None = None
        self.routes: dict[str, RouteSeries] = {}
        self._wait: Histogram | None = None
        self._invalidations: Counter | None = None

    @property
    def wait(self) -> Histogram:
        """The waits. Made at first use: a pool that refuses instead of waiting has none."""
        if self._wait is None:
            self._wait = self._writer.histogram(catalog.POOL_WAIT, self.name)
            self.pending = self._writer.gauge(catalog.POOL_PENDING, self.name)
        return self._wait

    @property
    def invalidations(self) -> Counter:
        """The connections thrown away. Made at first use: not every library says so."""
        if self._invalidations is None:
            self._invalidations = self._writer.counter(catalog.POOL_INVALIDATIONS, self.name)
        return self._invalidations

    def route(self, request: Ledger | None) -> RouteSeries:
        """Return the counters of the route that ``request`` belongs to."""
        name = OUTSIDE if request is None else request.route or UNMATCHED
        series = self.routes.get(name)
        if series is None:
            series = self.routes[name] = RouteSeries(self._writer, self.name, name)
        return series

    def write(self, readings: list[Reading], pending: int) -> None:
        """Write the gauges: the sum over the pools of this name."""
        self.used.set(sum(reading.used for reading in readings))
        self.idle.set(sum(reading.idle for reading in readings))
        if self.pending is not None:
            self.pending.set(pending)
        limits = [reading.maximum for reading in readings if reading.maximum is not None]
        if limits:
            if self.max is None:
                self.max = self._writer.gauge(catalog.POOL_MAX, self.name)
            self.max.set(sum(limits))
        kept = [reading.idle_max for reading in readings if reading.idle_max is not None]
        if kept:
            if self.idle_max is None:
                self.idle_max = self._writer.gauge(catalog.POOL_IDLE_MAX, self.name)
            self.idle_max.set(sum(kept))
