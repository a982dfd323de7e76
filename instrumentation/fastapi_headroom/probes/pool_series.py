"""The series of connection pools, with their handles resolved once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.checkout_site import Holder, Site
from fastapi_headroom.store.writer import Counter, Gauge, Histogram, Writer
from fastapi_headroom.thresholds import CONNECTION_BYTES

OUTSIDE: Final = "_outside"
"""The route of what runs outside any request: start-up, background loops, workers of a queue."""
UNMATCHED: Final = "_unmatched"
"""The route of a request that no route has matched (yet)."""
STATE_KEY: Final = "_fastapi_headroom"
"""The attribute of a pool that carries its PoolState."""
HOLD_KEY: Final = "fastapi_headroom.hold"
"""Where a connection record's ``record_info`` keeps its Hold while it is checked out."""

NOT_SEEN: Final[Collection[Any]] = ()
"""What stands for the idle connections of a pool before its first wait, and for good where they cannot be seen."""


class RouteSeries:
    """The counters of one pool and one route."""

    __slots__ = ("hold", "idle_hold", "long_holds", "wait")

    def __init__(self, writer: Writer, pool: str, route: str) -> None:
        self.wait: Counter = writer.counter(catalog.POOL_WAIT_BY_ROUTE, pool, route)
        self.hold: Counter = writer.counter(catalog.POOL_HOLD_BY_ROUTE, pool, route)
        self.idle_hold: Counter = writer.counter(catalog.POOL_IDLE_HOLD_BY_ROUTE, pool, route)
        self.long_holds: Counter = writer.counter(catalog.POOL_LONG_HOLDS, pool, route)


class QueueSeries:
    """What only a pool of limited size has: waits, time-outs, connections kept."""

    __slots__ = ("demand", "idle", "overflow", "pending", "timeouts", "wait")

    def __init__(self, writer: Writer, pool: str) -> None:
        self.wait: Histogram = writer.histogram(catalog.POOL_WAIT, pool)
        self.demand: Histogram = writer.histogram(catalog.POOL_DEMAND, pool)
        self.timeouts: Counter = writer.counter(catalog.POOL_TIMEOUTS, pool)
        self.pending: Gauge = writer.gauge(catalog.POOL_PENDING, pool)
        self.idle: Gauge = writer.gauge(catalog.POOL_COUNT, pool, "idle")
        self.overflow: Gauge = writer.gauge(catalog.POOL_OVERFLOW, pool)


class PoolSeries:
    """The series of one pool name. Several pools may share it; the gauges are their sum."""

    __slots__ = ("_writer", "create", "idle_max", "invalidations", "max", "name", "queue", "routes", "use", "used")

    def __init__(self, writer: Writer, name: str) -> None:
        self._writer = writer
        self.name = name
        self.create: Histogram = writer.histogram(catalog.POOL_CREATE, name)
        self.use: Histogram = writer.histogram(catalog.POOL_USE, name)
        self.used: Gauge = writer.gauge(catalog.POOL_COUNT, name, "used")
        self.invalidations: Counter = writer.counter(catalog.POOL_INVALIDATIONS, name)
        self.queue: QueueSeries | None = None
        self.max: Gauge | None = None
        self.idle_max: Gauge | None = None
        self.routes: dict[str, RouteSeries] = {}

    def limited(self) -> QueueSeries:
        """Return the series of a limited pool, made at the first such pool: NullPool has no limit, not one of 0."""
        if self.queue is None:
            self.queue = QueueSeries(self._writer, self.name)
        return self.queue

    def announce(self, pool: Any) -> None:
        """Make the series of what a pool is set up to do, and write what its connections cost the server."""
        if pool._pre_ping:
            self.ping_failures()
        if pool._recycle > -1:
            self.recycles("age")
        size = CONNECTION_BYTES.get(getattr(pool._dialect, "name", ""))
        if size is not None:
            self._writer.gauge(catalog.CONNECTION_BYTES, self.name).set(size)

    def ping_failures(self) -> Counter:
        """Return the counter of connections that failed their pre-ping."""
        return self._writer.counter(catalog.POOL_PING_FAILURES, self.name)

    def recycles(self, reason: str) -> Counter:
        """Return the counter of connections replaced in good order: reason age or invalidated."""
        return self._writer.counter(catalog.POOL_RECYCLES, self.name, reason)

    def leaked(self, route: str) -> Gauge:
        """Return the gauge of connections that nobody is left to give back."""
        return self._writer.gauge(catalog.POOL_LEAKED, self.name, route)

    def route(self, ledger: Ledger | None) -> RouteSeries:
        """Return the counters of the route that ``ledger`` belongs to."""
        name = OUTSIDE if ledger is None else ledger.route or UNMATCHED
        series = self.routes.get(name)
        if series is None:
            series = self.routes[name] = RouteSeries(self._writer, self.name, name)
        return series

    def write(self, counts: Counts) -> None:
        """Write the gauges."""
        self.used.set(counts.used)
        if self.queue is not None:
            self.queue.idle.set(counts.idle)
            self.queue.pending.set(counts.pending)
            self.queue.overflow.set(counts.overflow)
        if counts.limited:
            if self.max is None:
                self.max = self._writer.gauge(catalog.POOL_MAX, self.name)
            self.max.set(counts.maximum)
        if counts.kept:
            if self.idle_max is None:
                self.idle_max = self._writer.gauge(catalog.POOL_IDLE_MAX, self.name)
            self.idle_max.set(counts.kept)


class Counts:
    """The connections of all pools of one name at one moment."""

    __slots__ = ("idle", "kept", "limited", "maximum", "overflow", "pending", "used")

    def __init__(self) -> None:
        self.used = self.idle = self.pending = self.overflow = self.maximum = self.kept = 0
        self.limited = False

    def add(self, pool: Any, state: PoolState, *, current: bool) -> None:
        """Add a pool. One that ``dispose()`` has replaced (not ``current``) adds what is still checked out of it."""
        held = len(state.held)
        self.pending += len(state.waiting)
        if not current or state.queue is None:
            self.used += held
            return
        self.used += max(held, pool.checkedout())  # what was checked out before measuring began counts too
        if state.is_asyncio and "_queue" not in vars(pool._pool):
            # its queue is made at first use by the event loop; asking for its size from here would make a second one
            idle = 0
        else:
            idle = _idle(pool)
        self.idle += idle
        self.overflow += max(0, pool.overflow())
        size = pool.size()
        self.kept += size
        if pool._max_overflow >= 0:
            self.limited = True
            self.maximum += size + pool._max_overflow


def _idle(pool: Any) -> int:
    """Return how many connections lie open in a pool. A place whose connection was closed as broken is kept as well."""
    queue = getattr(pool._pool, "_queue", pool._pool)  # an asyncio queue within SQLAlchemy's
    places = getattr(queue, "_queue", None) or getattr(queue, "queue", None)
    if places is None:
        return int(pool.checkedin())
    return sum(1 for record in list(places) if record.dbapi_connection is not None)


class PoolState:
    """What is known of one pool object. It hangs on the pool, so that it goes when the pool goes."""

    __slots__ = ("depth", "epoch", "held", "home", "idle", "is_asyncio", "queue", "series", "waiting")

    def __init__(self, epoch: object, series: PoolSeries, queue: QueueSeries | None, is_asyncio: bool) -> None:
        self.epoch = epoch
        """The run of the probe that made it; another one's state is dead (after a fork)."""
        self.series = series
        self.queue = queue
        self.is_asyncio = is_asyncio
        self.idle = NOT_SEEN
        """The pool's own container of idle connections, if it is certain that a checkout takes one without waiting."""
        self.waiting: dict[Any, tuple[float, Ledger | None]] = {}
        """Who waits for a connection (thread or greenlet), since when, and for which request."""
        self.home: tuple[Any, int] | None = None
        """The event loop on which an async pool opened its last connection, and the loop's thread (native id)."""
        self.depth = 0
        """See ``checkout_site``."""
        self.held: set[Hold] = set()
        """The connections that are checked out."""

    def rename(self, series: PoolSeries) -> None:
        """Write to the series of another name from now on."""
        self.series = series
        if self.queue is not None:
            self.queue = series.limited()


class Hold:
    """One connection that is checked out. Whoever makes one sets all of it, which is cheaper than an ``__init__``."""

    __slots__ = ("busy", "counted", "holder", "info", "ledger", "site", "started", "state")

    state: PoolState
    info: dict[Any, Any]
    """The ``record_info`` that it is kept in."""
    ledger: Ledger | None
    started: float
    site: Site
    holder: Holder
    busy: float
    """Seconds that statements ran on it."""
    counted: bool
    """Whether it was counted as a long one."""
