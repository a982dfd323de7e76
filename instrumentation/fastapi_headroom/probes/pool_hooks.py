"""The places of SQLAlchemy where the pool probe listens."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi_headroom import ledger
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_series import HOLD_KEY, STATE_KEY, Hold

if TYPE_CHECKING:
    from fastapi_headroom.probes.pool import PoolProbe


class PoolHooks:
    """The wraps and event listeners of one probe."""

    def __init__(self, probe: PoolProbe, patches: Patches) -> None:
        self.probe = probe
        self._patches = patches
        self._listeners = (
            ("checkin", self._checkin),
            ("detach", self._detach),
            ("invalidate", self._invalidate),
            ("soft_invalidate", self._invalidate),
        )

    def attach(self) -> None:
        """Wrap checkout, wait and connection making, and listen to the events of all pools."""
        from sqlalchemy import event
        from sqlalchemy.engine.base import Engine
        from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool
        from sqlalchemy.pool.base import _ConnectionRecord

        wrap = self._patches.wrap
        wrap(Engine, "raw_connection", self._wrap_raw_connection)
        wrap(Pool, "connect", self._wrap_connect)
        wrap(SingletonThreadPool, "connect", self._wrap_connect)
        wrap(QueuePool, "_do_get", self._wrap_do_get)
        wrap(_ConnectionRecord, "_ConnectionRecord__connect", self._wrap_create)
        for name, listener in self._listeners:
            event.listen(Pool, name, listener)

    def detach(self) -> None:
        """Remove the event listeners; ``Patches.restore`` does the rest."""
        from sqlalchemy import event
        from sqlalchemy.pool import Pool

        for name, listener in self._listeners:
            if event.contains(Pool, name, listener):  # not if attach failed half-way
                event.remove(Pool, name, listener)

    def _wrap_raw_connection(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Make a pool known together with its engine, whose URL names it."""
        probe = self.probe

        def raw_connection(engine: Any) -> Any:
            epoch = probe.epoch
            if epoch is not None:
                try:
                    pool = engine.pool
                    state = vars(pool).get(STATE_KEY)
                    if state is None or state.epoch is not epoch:
                        probe.state_of(pool, engine)
                except Exception as failure:
                    probe.guard.failed(failure)
            return original(engine)

        return raw_connection

    def _wrap_connect(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Note who holds what the pool gives out."""
        probe = self.probe

        def connect(pool: Any) -> Any:
            epoch = probe.epoch
            if epoch is None:
                return original(pool)
            state = vars(pool).get(STATE_KEY)
            if state is None or state.epoch is not epoch:
                try:
                    state = probe.state_of(pool)
                except Exception as failure:
                    probe.guard.failed(failure)
                    return original(pool)
            fairy = original(pool)
            if state is not None:
                probe.begin_hold(state, fairy)
            return fairy

        return connect

    def _wrap_do_get(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Time the wait, up to the moment in which a connection of its own is opened (see ``_wrap_create``)."""
        from sqlalchemy.exc import TimeoutError as PoolTimeoutError

        probe, who = self.probe, _identify()

        def _do_get(pool: Any) -> Any:
            state = vars(pool).get(STATE_KEY)
            if state is None or state.epoch is not probe.epoch:
                return original(pool)
            me = who()
            waiting = state.waiting
            if me in waiting:  # it calls itself when another one was faster
                return original(pool)
            request = ledger.current.get()
            if request is not None:
                request.enter(ledger.POOL_WAIT)
            waiting[me] = (perf_counter(), request)
            try:
                return original(pool)
            except PoolTimeoutError:
                state.queue.timeouts.inc()
                raise
            finally:
                wait = waiting.pop(me, None)
                if wait is not None:
                    probe.end_wait(state, *wait)

        return _do_get

    def _wrap_create(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Time the opening of a connection: a new one, or one in place of a broken or too old one."""
        probe, who = self.probe, _identify()

        def connect(record: Any) -> None:
            epoch = probe.epoch
            if epoch is None:
                original(record)
                return
            state = vars(record._ConnectionRecord__pool).get(STATE_KEY)
            if state is None or state.epoch is not epoch:
                original(record)
                return
            wait = state.waiting.pop(who(), None)
            if wait is not None:  # it does not wait for a connection any more, it makes one
                probe.end_wait(state, *wait)
            request = ledger.current.get()
            if request is not None:
                request.enter(ledger.DB)
            started = perf_counter()
            try:
                original(record)
                state.series.create.observe(perf_counter() - started)
            finally:
                if request is not None:
                    request.leave(ledger.DB)

        return connect

    def _checkin(self, dbapi_connection: Any, record: Any) -> None:
        hold: Hold | None = record.record_info.get(HOLD_KEY)
        if hold is not None:
            self.probe.end_hold(hold)

    def _detach(self, dbapi_connection: Any, record: Any) -> None:
        self._checkin(dbapi_connection, record)

    def _invalidate(self, dbapi_connection: Any, record: Any, exception: BaseException | None) -> None:
        state = vars(record._ConnectionRecord__pool).get(STATE_KEY)
        if state is not None and state.epoch is self.probe.epoch:
            state.series.invalidations.inc()


def _identify() -> Callable[[], Any]:
    """Return the function that says who runs: the greenlet where there are any (async engines, gevent)."""
    try:
        greenlet: Any = importlib.import_module("greenlet")
    except ImportError:
        return threading.get_ident
    identify: Callable[[], Any] = greenlet.getcurrent
    return identify
