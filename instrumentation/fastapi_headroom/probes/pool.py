"""The pool probe: how long checkouts wait, who waits, who holds, and what is left of the pool.

SQLAlchemy fires no event before a checkout, so ``Pool.connect`` is wrapped once at class level: that sees every
pool, of sync and async engines, made before or after, and the new one after ``dispose()``. The wait is the time in
``QueuePool._do_get`` up to the moment in which it starts to open a connection of its own.

Waits that end in a time-out or a cancellation count as waits: leaving them out would make an exhausted pool look fast.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from time import perf_counter
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary, WeakSet

from fastapi_headroom import catalog, ledger
from fastapi_headroom.catalog import Metric
from fastapi_headroom.errors import SettingsError
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.leaks import Leaks
from fastapi_headroom.probes.long_holds import LongHolds
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_autosize import Autosizers
from fastapi_headroom.probes.pool_hooks import PoolHooks
from fastapi_headroom.probes.pool_names import MAX_NAMES, base_engine, derive_name
from fastapi_headroom.probes.pool_series import HOLD_KEY, OUTSIDE, STATE_KEY, Counts, Hold, PoolSeries, PoolState
from fastapi_headroom.probes.statements import Statements
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import spans

TRACED_WAIT: Final = 0.001
"""Seconds from which on a wait becomes a span."""
_bound: PoolProbe | None = None
"""The probe that measures. SQLAlchemy's classes are the process's, so there is one at a time: the last one bound."""


class PoolProbe:
    """Measures SQLAlchemy's connection pools and statements."""

    name: ClassVar[str] = "pool"
    metrics: ClassVar[tuple[Metric, ...]] = tuple(row for row in catalog.ALL if row.stem == "pool")

    def __init__(self, settings: Settings, names: Mapping[str, Any] | None = None) -> None:
        """Prepare to measure. ``names`` gives pools names of the user's choice: ``{"primary": engine}``."""
        self.settings = settings
        self.guard = Guard(self.name)
        self.statements = Statements(self.guard)
        self.long_holds = LongHolds(settings.hold_threshold)
        self.leaks = Leaks(settings.hold_threshold)
        self.autosizers = Autosizers(self)
        self.epoch: object | None = None
        """The current run, None while not bound. After a fork what was made in the parent is of another epoch."""
        self._writer: Writer | None = None
        self._lock = threading.Lock()
        self._patches = Patches()
        self._hooks: PoolHooks | None = None
        self._series: dict[str, PoolSeries] = {}
        self._pools: WeakSet[Any] = WeakSet()
        self._engines: WeakSet[Any] = WeakSet()
        self._names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """By dialect: an engine's dialect outlives ``dispose()`` and is known to the pool."""
        self.name_engines(names or {})

    def name_engines(self, names: Mapping[str, Any]) -> None:
        """Give engines (sync or async) names of the user's choice. Raises SettingsError for what is no engine."""
        for given, engine in names.items():
            owner = base_engine(engine)
            if not hasattr(owner, "dialect") or not hasattr(owner, "pool"):
                raise SettingsError(
                    f"pools={{{given!r}: {type(engine).__name__}}} is no SQLAlchemy engine; "
                    "give what create_engine() or create_async_engine() returned"
                )
            self._names[owner.dialect] = given
            self._engines.add(owner)
            state = self.state_of(owner.pool, owner)
            if state is not None:
                state.rename(self._series_named(given))

    def bind(self, writer: Writer) -> None:
        """Resolve handles, and attach hooks if the app uses SQLAlchemy (else ``sample`` looks again)."""
        global _bound
        if _bound is not None and _bound is not self:
            _bound.close()
        _bound = self
        self._lock = threading.Lock()  # a fork may have left the old one held by a thread that is no more
        self._writer = writer
        self._series = {}
        self.guard.bind(writer)
        self.statements.bind(writer)
        self.long_holds.rearm()
        self.leaks.rearm()
        self.epoch = object()
        self._hook()
        for engine in list(self._engines):
            self.state_of(engine.pool, engine)
        self.autosizers.bind(writer)

    def _hook(self) -> None:
        if self._hooks is None and "sqlalchemy" in sys.modules:
            # importing it for an app that does not use it would cost 70 ms and 12 MB
            self._hooks = PoolHooks(self, self._patches)
            self._hooks.attach()
            self.statements.attach(self._patches)

    def close(self) -> None:
        """Take all hooks out and leave no trace on pools and connections. Idempotent."""
        global _bound
        if _bound is self:
            _bound = None
        self.autosizers.close()
        self.epoch = None
        self._writer = None
        self.statements.bind(None)
        self._patches.restore()
        if self._hooks is not None:
            self._hooks.detach()
            self._hooks = None
        with self._lock:
            pools = list(self._pools)
            self._pools.clear()
        for pool in pools:
            state = vars(pool).pop(STATE_KEY, None)
            for hold in list(state.held) if state is not None else ():
                hold.info.pop(HOLD_KEY, None)

    def sample(self) -> None:
        """Write the gauges of all pools, and look for connections that are held for long."""
        if self._writer is None:
            return
        self._hook()
        with self._lock:
            engines, pools = list(self._engines), list(self._pools)
        for engine in engines:
            if engine.pool not in pools:  # dispose() made a new one that was not used yet
                pools.append(engine.pool)
                self.state_of(engine.pool, engine)
        current = {id(engine.pool) for engine in engines}
        owned = {id(engine.dialect) for engine in engines}
        totals = {series.name: Counts() for series in list(self._series.values())}
        states = []
        for pool in pools:
            state: PoolState | None = vars(pool).get(STATE_KEY)
            if state is not None and state.epoch is self.epoch:
                states.append(state)
                live = id(pool) in current or id(pool._dialect) not in owned
                totals.setdefault(state.series.name, Counts()).add(pool, state, current=live)
        for name, counts in totals.items():
            self._series[name].write(counts)
        self.long_holds.look(states)
        self.leaks.look(states)

    def state_of(self, pool: Any, engine: Any = None) -> PoolState | None:
        """Return the state that hangs on ``pool``, made at its first sight. None while not bound."""
        epoch, writer = self.epoch, self._writer
        state: PoolState | None = vars(pool).get(STATE_KEY)
        if (state is not None and state.epoch is epoch) or epoch is None or writer is None:
            return state if epoch is not None else None
        from sqlalchemy.pool import QueuePool

        with self._lock:
            series = self._series_named(self._names.get(pool._dialect) or derive_name(pool, engine))
            queue = series.limited() if isinstance(pool, QueuePool) else None
            series.announce(pool)
            state = PoolState(epoch, series, queue, bool(getattr(pool, "_is_asyncio", False)))
            setattr(pool, STATE_KEY, state)
            self._pools.add(pool)
            if engine is not None:
                self._engines.add(base_engine(engine))
        return state

    def _series_named(self, name: str) -> PoolSeries:
        if name not in self._series and len(self._series) >= MAX_NAMES:
            name = OTHER
        series = self._series.get(name)
        if series is None:
            assert self._writer is not None
            series = self._series[name] = PoolSeries(self._writer, name)
        return series

    def write_server_limit(self, pool: Any, limit: float) -> None:
        """Write how many connections the server behind ``pool`` allows."""
        state = self.state_of(pool)
        if state is not None and self._writer is not None:
            self._writer.gauge(catalog.DATABASE_CONNECTIONS_MAX, state.series.name).set(limit)

    def end_wait(self, state: PoolState, started: float, request: Ledger | None) -> None:
        """Record a wait that began at ``started``, however it ended."""
        try:
            if request is not None:
                request.leave(ledger.POOL_WAIT)
            waited = perf_counter() - started
            if state.queue is not None:
                state.queue.wait.observe(waited)
            series = state.series
            route = series.routes.get(OUTSIDE if request is None else request.route) or series.route(request)
            route.wait.inc(waited)
            if spans.active and waited >= TRACED_WAIT:
                now = time.time_ns()
                attributes = {"db.client.connection.pool.name": state.series.name}
                spans.record("pool wait", now - int(waited * 1e9), now, attributes)
        except Exception as failure:
            self.guard.failed(failure)

    def end_hold(self, hold: Hold) -> None:
        """Record that a connection came back, or left the pool for good."""
        try:
            hold.info.pop(HOLD_KEY, None)
            state = hold.state
            state.held.discard(hold)
            seconds = perf_counter() - hold.started
            series, request = state.series, hold.ledger
            series.use.observe(seconds)
            route = series.routes.get(OUTSIDE if request is None else request.route) or series.route(request)
            route.hold.inc(seconds)
            idle = seconds - hold.busy
            if idle > 0.0:
                route.idle_hold.inc(idle)
            if seconds >= self.long_holds.threshold:
                self.long_holds.count(hold)
        except Exception as failure:
            self.guard.failed(failure)
