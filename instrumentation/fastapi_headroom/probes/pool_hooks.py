"""The places of SQLAlchemy where the pool probe listens."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
from collections.abc import Callable, Collection
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from fastapi_headroom import ledger
from fastapi_headroom.probes.checkout_site import checkout_site, task_here
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.pool_series import HOLD_KEY, NOT_SEEN, STATE_KEY, Hold, PoolState
from fastapi_headroom.probes.pool_server import PoolServer

if TYPE_CHECKING:
    from fastapi_headroom.probes.pool import PoolProbe

_FRAMES: Final = 6
"""Frames above a checkout among which its engine is looked for: some wrap ``raw_connection`` as well."""


class PoolHooks:
    """The wraps and event listeners of one probe."""

    def __init__(self, probe: PoolProbe, patches: Patches) -> None:
        self.probe = probe
        self._patches = patches
        self._ping_failed: type[BaseException] | tuple[()] = ()
        """What SQLAlchemy raises, and catches, when a connection fails its pre-ping."""
        self._listeners = (
            ("detach", self._detach),
            ("invalidate", self._invalidate),
            ("soft_invalidate", self._invalidate),
            ("connect", PoolServer(probe).connected),
        )

    def attach(self) -> None:
        """Wrap checkout, wait and connection making, and listen to the events of all pools."""
        from sqlalchemy import event
        from sqlalchemy.exc import InvalidatePoolError
        from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool
        from sqlalchemy.pool.base import _ConnectionRecord

        self._ping_failed = InvalidatePoolError
        wrap = self._patches.wrap
        wrap(Pool, "connect", self._wrap_connect)
        wrap(SingletonThreadPool, "connect", self._wrap_connect)
        wrap(QueuePool, "_do_get", self._wrap_do_get)
        wrap(_ConnectionRecord, "_ConnectionRecord__connect", self._wrap_create)
        wrap(_ConnectionRecord, "checkin", self._wrap_checkin)
        for name, listener in self._listeners:
            event.listen(Pool, name, listener)

    def detach(self) -> None:
        """Remove the event listeners; ``Patches.restore`` does the rest."""
        from sqlalchemy import event
        from sqlalchemy.pool import Pool

        for name, listener in self._listeners:
            if event.contains(Pool, name, listener):  # not if attach failed half-way
                event.remove(Pool, name, listener)

    def _wrap_connect(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Note who holds what the pool gives out."""
        probe, current, now, greenlet = self.probe, ledger.current.get, perf_counter, _identify(otherwise=lambda: None)
        thread = threading.get_ident

        def connect(pool: Any) -> Any:
            state = pool.__dict__.get(STATE_KEY)
            if state is None or state.epoch is not probe.epoch:
                state = self._first_sight(pool)
                if state is None:
                    return original(pool)
            fairy = original(pool)
            try:
                if fairy._counter == 1:  # else SingletonThreadPool lent it to this thread already
                    info = fairy._connection_record.record_info
                    if HOLD_KEY in info:
                        probe.end_hold(info[HOLD_KEY])  # StaticPool lends its one connection to all
                    is_asyncio = state.is_asyncio
                    hold = Hold()
                    hold.state, hold.info, hold.ledger = state, info, current()
                    hold.busy, hold.counted = 0.0, False
                    hold.started = now()
                    if is_asyncio:
                        home = state.home
                        hold.site = checkout_site(greenlet(), state)
                        hold.holder = task_here(None if home is None else home[0])
                    else:
                        hold.site, hold.holder = checkout_site(None, state), thread()
                    info[HOLD_KEY] = hold
                    state.held.add(hold)
            except Exception as failure:
                probe.guard.failed(failure)
            return fairy

        return connect

    def _first_sight(self, pool: Any) -> PoolState | None:
        """Make a pool known together with its engine, whose URL names it. None while the probe is not bound."""
        try:
            if self.probe.epoch is None:
                return None
            return self.probe.state_of(pool, _engine_above(sys._getframe(2), pool))
        except Exception as failure:
            self.probe.guard.failed(failure)
            return None

    def _wrap_do_get(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Time the wait, up to the moment in which a connection of its own is opened (see ``_wrap_create``)."""
        from sqlalchemy.exc import TimeoutError as PoolTimeoutError

        probe, who, at_once = self.probe, _identify(), _takes_at_once()
        current, now, end_wait = ledger.current.get, perf_counter, probe.end_wait

        def _do_get(pool: Any) -> Any:
            state = pool.__dict__.get(STATE_KEY)
            if state is None or state.epoch is not probe.epoch:
                return original(pool)
            if state.idle:  # on one loop nobody else can take what lies ready: there is no wait to account for
                try:
                    state.queue.wait.observe_none()
                    state.queue.demand.observe(len(state.held))
                except Exception as failure:
                    probe.guard.failed(failure)
                return original(pool)
            if at_once and state.is_asyncio and state.idle is NOT_SEEN:
                state.idle = _idle_connections(pool)
            me = who()
            waiting = state.waiting
            if me in waiting:  # it calls itself when another one was faster
                return original(pool)
            try:
                state.queue.demand.observe(len(state.held) + len(waiting))
            except Exception as failure:
                probe.guard.failed(failure)
            request = current()
            if request is not None:
                request.enter(ledger.POOL_WAIT)
            waiting[me] = (now(), request)
            try:
                return original(pool)
            except PoolTimeoutError:
                state.queue.timeouts.inc()
                raise
            finally:
                wait = waiting.pop(me, None)
                if wait is not None:
                    end_wait(state, wait[0], wait[1])

        return _do_get

    def _wrap_create(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Time the opening of a connection: a new one, or one in place of a broken or too old one."""
        probe, who = self.probe, _identify()
        running_loop, native_id = asyncio._get_running_loop, threading.get_native_id

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
            try:
                reason = _replaced(sys._getframe(1), record)
                if reason is not None:
                    state.series.recycles(reason).inc()
            except Exception as failure:
                probe.guard.failed(failure)
            request = ledger.current.get()
            if request is not None:
                request.enter(ledger.DB)
            if state.is_asyncio:
                state.home = running_loop(), native_id()
            started = perf_counter()
            try:
                original(record)
                state.series.create.observe(perf_counter() - started)
            finally:
                if request is not None:
                    request.leave(ledger.DB)

        return connect

    def _wrap_checkin(self, original: Callable[..., None]) -> Callable[..., None]:
        """Note what comes back. A listener to the event of that name would cost twice as much."""
        end_hold, guard = self.probe.end_hold, self.probe.guard

        def checkin(record: Any, *args: Any, **kwargs: Any) -> None:
            try:
                hold = record.record_info.get(HOLD_KEY)
                if hold is not None:
                    end_hold(hold)
            except Exception as failure:
                guard.failed(failure)
            if args or kwargs:
                original(record, *args, **kwargs)
            else:  # nearly always, and a plain call costs a third
                original(record)

        return checkin

    def _detach(self, dbapi_connection: Any, record: Any) -> None:
        hold: Hold | None = record.record_info.get(HOLD_KEY)
        if hold is not None:
            self.probe.end_hold(hold)

    def _invalidate(self, dbapi_connection: Any, record: Any, exception: BaseException | None) -> None:
        try:
            pool = record._ConnectionRecord__pool
            state = vars(pool).get(STATE_KEY)
            if state is None or state.epoch is not self.probe.epoch:
                return
            state.series.invalidations.inc()
            if pool._pre_ping and isinstance(exception, self._ping_failed):
                state.series.ping_failures().inc()
        except Exception as failure:
            self.probe.guard.failed(failure)


def _identify(otherwise: Callable[[], Any] = threading.get_ident) -> Callable[[], Any]:
    """Return the function that gives the greenlet that runs, ``otherwise`` where there are none.

    There are where engines are async, and under gevent; so it says who runs.
    """
    try:
        greenlet: Any = importlib.import_module("greenlet")
    except ImportError:
        return otherwise
    current: Callable[[], Any] = greenlet.getcurrent
    return current


def _replaced(frame: FrameType, record: Any) -> str | None:
    """Return why ``get_connection`` has closed a connection before it opens one anew: age or invalidated.

    None if it did not: what was invalidated by an error has been closed, and counted, before.
    """
    if frame.f_code.co_name != "get_connection" or not frame.f_locals.get("recycle"):
        return None
    oldest = record._ConnectionRecord__pool._recycle
    return "age" if -1 < oldest < time.time() - record.starttime else "invalidated"


def _engine_above(frame: FrameType | None, pool: Any) -> Any:
    """Return the engine on whose behalf a pool is asked, None if it is none.

    Asked once per pool: a wrap of ``Engine.raw_connection`` would tell as well, and cost every checkout something.
    """
    for _ in range(_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name == "raw_connection":
            engine = frame.f_locals.get("self")
            if getattr(engine, "pool", None) is pool:
                return engine
        frame = frame.f_back
    return None


def _takes_at_once() -> bool:
    """Return whether an async pool gives an idle connection without awaiting; SQLAlchemy before 2.1 suspends."""
    from sqlalchemy.util.queue import AsyncAdaptedQueue

    class Stored:
        def get_nowait(self) -> bool:
            return True

    try:
        queue: Any = AsyncAdaptedQueue()
        queue.__dict__["_queue"] = Stored()
        return queue.get(True, None) is True
    except Exception:  # it asked for what awaits
        return False


def _idle_connections(pool: Any) -> Collection[Any]:
    """Return the container of an async pool's idle connections, an empty one where it is not what we know."""
    found = getattr(getattr(pool._pool, "_queue", None), "_queue", ())
    return found if isinstance(found, Collection) else ()
