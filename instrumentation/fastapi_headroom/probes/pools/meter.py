"""What every pool's adapter does alike: time waits and holds, name pools, read them for the gauges."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any, ClassVar, Final, Protocol

from fastapi_headroom import ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_series import OUTSIDE
from fastapi_headroom.probes.pools.series import MeterSeries, Reading
from fastapi_headroom.probes.pools.timing import Wait
from fastapi_headroom.tracing import spans

TRACED_WAIT: Final = 0.001
"""Seconds from which on a wait becomes a span."""
_current: Final = ledger.current.get


class Adapter(Protocol):
    """One library's pools: where to listen, and how to read them."""

    modules: ClassVar[tuple[str, ...]]
    """Where the library's pools are defined. Nothing is attached before the app has imported all of them."""
    stage: ClassVar[int | None]
    """The ledger's stage that another probe has open around a checkout; the wait is taken out of it."""
    finds_broken: ClassVar[bool]
    """Whether broken connections are noticed."""

    def attach(self, meters: Meters, patches: Patches) -> None:
        """Wrap checkout, connecting and checkin."""

    def pool_of(self, thing: Any) -> Any:
        """Return the pool behind what a user gave a name to, None if it is none of this library."""

    def anchor(self, pool: Any) -> Any:
        """Return an object that lives exactly as long as the pool and can be referred to weakly, None if not yet."""

    def name(self, pool: Any) -> str:
        """Return a readable name without credentials and paths, with the library before it."""

    def waits(self, pool: Any) -> bool:
        """Return whether a checkout waits when the pool is exhausted; some refuse at once."""

    def read(self, pool: Any, held: int) -> Reading | None:
        """Return the pool's numbers, None once it is closed. ``held`` connections are known to be out."""


class Meter:
    """What is measured of one pool object."""

    __slots__ = ("anchor", "broken", "guard", "holds", "limited", "pool", "series", "stage", "waited", "waiting")

    def __init__(
        self, pool: Callable[[], Any], series: MeterSeries, stage: int | None, guard: Guard, *, limited: bool
    ) -> None:
        self.pool = pool
        """Returns the pool, None once it is gone."""
        self.series = series
        self.limited = limited
        """Whether a checkout waits when the pool is exhausted."""
        self.waited: Callable[[float], None] = series.wait.observe if limited else _ignore
        self.stage = stage
        self.guard = guard
        self.anchor: Any = None
        self.waiting: set[Wait] = set()
        self.holds: dict[Any, tuple[float, Ledger | None]] = {}
        """What is checked out, since when, and for which request. By identity: nothing of the user's is kept alive."""
        self.broken = 0

    def begin(self, refusal: type[BaseException] | tuple[()] = ()) -> Wait:
        """Begin a wait; ``refusal`` is what the pool raises when it has none to give."""
        request = _current()
        wait = Wait(self, request, refusal)
        try:
            self.waiting.add(wait)
            if request is not None:
                stage = self.stage
                if stage is not None and stage in request.waits:  # both open would share the time
                    wait.suspended = True
                    request.leave(stage)
                request.enter(ledger.POOL_WAIT)
        except Exception as failure:
            self.guard.failed(failure)
        return wait

    def end(self, wait: Wait) -> None:
        """Record a wait, however it ended. Without effect on one that has ended."""
        if wait.waits:
            self.record(wait.request, self.leave(wait))

    def leave(self, wait: Wait) -> float:
        """End a wait without recording it and return its seconds, 0 if it has ended before."""
        if not wait.waits:
            return 0.0
        wait.waits = False
        waited = perf_counter() - wait.started
        try:
            self.waiting.discard(wait)
            request = wait.request
            if request is not None:
                request.leave(ledger.POOL_WAIT)
                if wait.suspended and self.stage is not None:
                    request.enter(self.stage)
        except Exception as failure:
            self.guard.failed(failure)
        return waited

    def record(self, request: Ledger | None, waited: float) -> None:
        """Record one checkout's wait of ``waited`` seconds."""
        try:
            self.waited(waited)
            self.series.route(request).wait.inc(waited)
            if spans.active and waited >= TRACED_WAIT:
                now = time.time_ns()
                attributes = {"db.client.connection.pool.name": self.series.name}
                spans.record("pool wait", now - int(waited * 1e9), now, attributes)
        except Exception as failure:
            self.guard.failed(failure)

    def refused(self) -> None:
        """Record that an exhausted pool gave no connection."""
        try:
            self.series.timeouts.inc()
        except Exception as failure:
            self.guard.failed(failure)

    def at_once(self) -> None:
        """Record a checkout that found a connection without waiting."""
        try:
            self.waited(0.0)
        except Exception as failure:
            self.guard.failed(failure)

    def took(self, connection: Any, now: Callable[[], float] = perf_counter) -> None:
        """Record that a connection is out from now on."""
        self.holds[id(connection)] = (now(), _current())

    def gave(self, connection: Any, now: Callable[[], float] = perf_counter) -> None:
        """Record that it came back."""
        try:
            started, request = self.holds.pop(id(connection))
        except KeyError:
            return
        try:
            seconds = now() - started
            series = self.series
            series.use.observe(seconds)
            routes = series.routes
            route = routes.get(OUTSIDE if request is None else request.route) or series.route(request)
            route.hold.inc(seconds)
        except Exception as failure:
            self.guard.failed(failure)

    def made(self, started: float) -> None:
        """Record that a connection was opened, begun at ``started``."""
        try:
            self.series.create.observe(perf_counter() - started)
        except Exception as failure:
            self.guard.failed(failure)

    def lost(self, connections: int = 1) -> None:
        """Record that connections were found broken and thrown away."""
        try:
            self.series.invalidations.inc(connections)
        except Exception as failure:
            self.guard.failed(failure)


class Meters:
    """The meters of all pools of one library."""

    def __init__(self, adapter: Adapter, guard: Guard, series: Callable[[str], MeterSeries | None]) -> None:
        """``series`` returns the series of a name, None while nothing is bound."""
        self.adapter = adapter
        self.guard = guard
        self._series = series
        self._by_id: dict[int, Meter] = {}
        self.known = self._by_id.get
        """Returns the meter of a pool that was seen before, by its identity: what a checkout asks first."""
        self._names: dict[int, tuple[Any, str]] = {}
        """The pools that the user named. They are the app's, and are kept until the end."""

    def of(self, pool: Any) -> Meter | None:
        """Return the meter of a pool, made at its first sight. None where it cannot be measured. Never raises."""
        return self._by_id.get(id(pool)) or self._first_sight(pool)

    def _first_sight(self, pool: Any) -> Meter | None:
        try:
            anchor = self.adapter.anchor(pool)
            named = self._names.get(id(pool))
            series = self._series(named[1] if named else self.adapter.name(pool)) if anchor is not None else None
            if series is None:
                return None
            adapter, by_id, key = self.adapter, self._by_id, id(pool)
            # an anchor other than the pool itself is a part of it that knows it
            reference = weakref.ref(anchor, lambda _: by_id.pop(key, None))
            meter = Meter(
                reference if anchor is pool else lambda: getattr(reference(), "_pool", None),
                series,
                adapter.stage,
                self.guard,
                limited=adapter.waits(pool),
            )
            meter.anchor = reference
            if adapter.finds_broken:
                meter.broken = self._broken(pool)
                _ = series.invalidations
            by_id[key] = meter
            return meter
        except Exception as failure:
            self.guard.failed(failure)
            return None

    def _broken(self, pool: Any) -> int:
        reading = self.adapter.read(pool, 0)
        return reading.broken if reading is not None else 0

    def give_name(self, pool: Any, name: str) -> None:
        """Let a pool have a name of the user's choice, from now on."""
        self._names[id(pool)] = (pool, name)
        meter = self._by_id.pop(id(pool), None)
        if meter is not None:
            renamed = self._first_sight(pool)
            if renamed is not None:
                renamed.holds, renamed.waiting = meter.holds, meter.waiting

    def holding(self, connection: Any) -> Meter | None:
        """Return the meter of the pool that a connection is out of, None if it is not out. Looks through all pools."""
        key = id(connection)
        return next((meter for meter in list(self._by_id.values()) if key in meter.holds), None)

    def forget(self) -> None:
        """Begin anew, as after a fork or at the end."""
        self._by_id.clear()

    def read(self) -> list[tuple[MeterSeries, Reading | None, int]]:
        """Return series, reading and number of waiting checkouts of every pool that is alive."""
        for pool, _ in list(self._names.values()):
            self.of(pool)
        rows = []
        for meter in list(self._by_id.values()):
            pool = meter.pool()
            if pool is None:
                continue
            reading = self.adapter.read(pool, len(meter.holds))
            if reading is not None and reading.broken > meter.broken:
                meter.lost(reading.broken - meter.broken)
                meter.broken = reading.broken
            rows.append((meter.series, reading, len(meter.waiting)))
        return rows


def _ignore(_: float) -> None:
    """Stand for the waits of a pool that has none."""


def address(library: str, database: Any, host: Any, port: Any) -> str:
    """Return ``library:database@host:port``, of a list the first host; a socket's directory is ``local``."""
    if isinstance(host, (list, tuple)):
        host = host[0] if host else ""
    if isinstance(port, (list, tuple)):
        port = port[0] if port else ""
    host, port = str(host or "localhost").partition(",")[0], str(port or "").partition(",")[0]
    if host.startswith(("/", "@")):
        host = "local"
    return f"{library}:{database or 'postgres'}@{host}" + (f":{port}" if port else "")
