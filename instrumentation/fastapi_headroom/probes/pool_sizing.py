"""One live pool that follows its load: what it reads, what it claims from the other workers, and what it does."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.advice.autosizing import Controller, Decision, Reading
from fastapi_headroom.advice.sharing import shares
from fastapi_headroom.errors import StoreError
from fastapi_headroom.probes.pool_bounds import Bounds
from fastapi_headroom.probes.pool_busy import Busy
from fastapi_headroom.probes.pool_resize import Resizer, loop_of
from fastapi_headroom.probes.pool_series import STATE_KEY, PoolState
from fastapi_headroom.store.claims import LINGER, Claims
from fastapi_headroom.store.writer import Writer

if TYPE_CHECKING:
    from fastapi_headroom.probes.pool import PoolProbe

log = logging.getLogger("fastapi_headroom")
_CLOSE_SECONDS: Final = 5.0
"""Seconds in which an async connection may say goodbye to its server."""
_RESTORE_SECONDS: Final = 1.0


class Sizing:
    """The sizing of one engine's pool in this process."""

    def __init__(
        self,
        engine: Any,
        bounds: Bounds,
        original: tuple[int, int],
        probe: PoolProbe,
        writer: Writer,
        path: Path | None,
        mode: int,
    ) -> None:
        from sqlalchemy import event

        self._engine, self._bounds, self._original, self._probe = weakref.ref(engine), bounds, original, probe
        state = probe.state_of(engine.pool, engine)
        assert state is not None
        self.name = state.series.name
        self._writer = writer
        self._claims = None if path is None else Claims(path, mode=mode)
        if self._claims is not None:
            weakref.finalize(engine, self._claims.close).atexit = False
        self._trouble = ""
        self._claimed = bounds.minimum
        self._owed: list[weakref.ref[Any]] = []
        """Pools that the engine has replaced while something was checked out of them."""
        self._controller = Controller(bounds.minimum, bounds.maximum, bounds.patience, enough=bounds.enough)
        self._busy = Busy()
        self._asked: tuple[Any, threading.Event] = None, threading.Event()
        """The event loop that was asked for something last, and whether it has done it."""
        self._asked[1].set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._resizer = Resizer(engine.pool, original, lambda: _waiting(engine_pool()))
        engine_pool = weakref.ref(engine.pool)
        self._wanted = writer.gauge(catalog.POOL_AUTOSIZE_WANTED, self.name)
        writer.gauge(catalog.POOL_AUTOSIZE_MINIMUM, self.name).set(bounds.minimum)
        writer.gauge(catalog.POOL_AUTOSIZE_MAXIMUM, self.name).set(bounds.maximum)
        writer.gauge(catalog.POOL_AUTOSIZE_BUDGET, self.name).set(bounds.budget)
        for direction, reason in (("grow", "demand"), ("shrink", "idle"), ("shrink", "budget")):
            writer.counter(catalog.POOL_AUTOSIZE_CHANGES, self.name, direction, reason)
        for reason in ("maximum", "budget", "cpu", "database"):
            writer.counter(catalog.POOL_AUTOSIZE_HELD_BACK, self.name, reason)
        self._target = -1
        self._wanted.set(bounds.minimum)
        first = Decision(bounds.minimum, "", "", bounds.minimum)
        self._go_to(*self._agree(first, limit=0))
        event.listen(engine, "engine_disposed", self._disposed)
        log.info(
            "fastapi-headroom: the pool %s follows its load from now on: %d to %d connections, %d in all workers "
            "(it was %s)",
            self.name, bounds.minimum, bounds.maximum, bounds.budget, _limit_text(*original),
        )  # fmt: skip

    @property
    def limit(self) -> int:
        """Connections that the pool may have open now."""
        return self._resizer.limit

    def tick(self) -> None:
        """Look, decide, claim and move, once."""
        engine = self._engine()
        if engine is None or self._closed or not self._loop_keeps_up():
            return
        if engine.pool is not self._resizer.pool_if_there:
            self._disposed(engine)
        reading = self._read(engine)
        if reading is None:
            return
        decision = self._controller.decide(reading)
        self._wanted.set(decision.wanted)
        self._go_to(*self._agree(decision, limit=reading.limit))
        self._run_in_pool(self._wake)  # also for one that was overtaken the last time

    # ------------------------------------------------------------------ reading
    def _read(self, engine: Any) -> Reading | None:
        pool, state = engine.pool, self._probe.state_of(engine.pool, engine)
        if state is None or state.queue is None:
            return None
        resizer, demand, use = self._resizer, state.queue.demand, state.series.use
        held, used = use.view[use.index], resizer.used
        return Reading(
            at=time.monotonic(),
            limit=resizer.limit,
            used=used,
            waiting=max(0, _waiting(pool) - (resizer.places - used)),
            found=[demand.view[cell] for cell in demand.cells],
            served=sum(use.view[cell] for cell in use.cells),
            held=held,
            busy=self._busy.share(None if state.home is None else state.home[1]),
        )

    # ------------------------------------------------------------------ agreeing with the other workers
    def _agree(self, decision: Decision, *, limit: int) -> tuple[int, str, str]:
        """Claim what was decided; return the size to go to, the reason, and what holds the pool back."""
        size: int = decision.size
        reason: str = decision.reason
        held: str = decision.held
        bounds, claims = self._bounds, self._claims
        beside = self._beside()
        if claims is None:  # metrics are captured for a test: there is nobody else
            return min(size, bounds.budget), reason, held
        wanted = max(bounds.minimum, min(decision.wanted, bounds.maximum))
        try:
            with claims.change() as change:
                others = change.others
                alive = [other for other in others if other.wanted]
                absent = max(0, (bounds.workers or 1) - 1 - len(alive)) * bounds.minimum
                budget = bounds.budget - absent
                asks = [other.wanted for other in others]
                floors = [other.floor for other in others]
                asks.insert(change.before, wanted)
                floors.insert(change.before, bounds.minimum)
                fair = shares(floors, asks, budget)
                share = fair.pop(change.before)
                lacking = sum(
                    max(0, due - other.claimed) for due, other in zip(fair, others, strict=True) if other.wanted
                )
                free = budget - change.taken - change.mine.lingering - max(limit, size) - beside
                if size > limit and size > share:
                    size, held = max(limit, share), "budget"
                if size > share and lacking > free:
                    size, reason, held = share, "budget", "budget"
                if size > limit and time.monotonic() - claims.lost_at < LINGER:
                    size, reason, held = limit, "", "budget"
                mine = change.write(max(size, limit) + beside, wanted, bounds.minimum, budget)
                self._claimed = mine.claimed
                self._trouble = ""
        except (OSError, StoreError) as error:
            if not self._trouble:
                log.warning(
                    "fastapi-headroom: the pool %s does not grow for now, as its worker cannot see the others: %s; "
                    "let it write to the store's directory (HEADROOM_DIRECTORY)", self.name, error,
                )  # fmt: skip
            self._trouble = str(error)
            return (size, reason, held) if size <= limit or self._target < 0 else (limit, "", "budget")
        if size + beside > mine.claimed:
            size = max(0, mine.claimed - beside)
            held = "budget"
            reason = reason if size > limit else "budget"
        return size, reason, held

    def _beside(self) -> int:
        """Return the connections that are open beside the pool's places: being closed, or of a replaced pool."""
        owed = 0
        for reference in list(self._owed):
            pool = reference()
            state = None if pool is None else vars(pool).get(STATE_KEY)
            open_there = 0 if pool is None or state is None else len(state.held) + pool._pool.qsize()
            owed += open_there
            if not open_there:
                self._owed.remove(reference)
        return owed + self._resizer.closing

    # ------------------------------------------------------------------ doing it
    def _go_to(self, size: int, reason: str, held: str) -> None:
        before = self._target
        if held:
            self._held_back(held)
        else:
            self._since = time.monotonic()
        if size == before == self._resizer.limit:
            return
        self._target = size
        if before >= 0 and size != before:
            direction = "grow" if size > before else "shrink"
            self._writer.counter(catalog.POOL_AUTOSIZE_CHANGES, self.name, direction, reason or "budget").inc()
            log.info(
                "fastapi-headroom: the pool %s %ss from %d to %d connections (%s): %d in use, %d waiting",
                self.name, direction, before, size, reason or "budget", self._resizer.used,
                _waiting(self._resizer.pool),
            )  # fmt: skip
        self._run_in_pool(lambda: self._apply(size))

    _since = 0.0

    def _held_back(self, reason: str) -> None:
        now = time.monotonic()
        if self._since:
            self._writer.counter(catalog.POOL_AUTOSIZE_HELD_BACK, self.name, reason).inc(max(0.0, now - self._since))
        self._since = now

    def _apply(self, size: int) -> None:
        resizer = self._resizer
        if self._closed or resizer.pool_if_there is None:
            return
        if resizer.pool._is_asyncio and self._loop() is None:
            size = max(size, resizer.places)  # what lies ready could not be closed
        self._close_all(resizer, resizer.resize(size))

    def _wake(self) -> None:
        if not self._closed and self._resizer.pool_if_there is not None:
            self._resizer.wake()

    def _close_all(self, resizer: Resizer, records: list[Any]) -> None:
        if not records:
            return
        if not resizer.pool._is_asyncio:
            for record in records:
                _close(resizer, record)
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(_close_async(resizer, records))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _loop(self) -> Any:
        """Return the loop of an async pool, None where it is not known or does not run any more."""
        state: PoolState | None = vars(self._resizer.pool).get(STATE_KEY)
        loop = state.home[0] if state is not None and state.home is not None else loop_of(self._resizer.pool)
        return None if loop is None or loop.is_closed() else loop

    def _loop_keeps_up(self) -> bool:
        """Return whether the event loop has done what it was asked for; while it is blocked nothing more is."""
        loop, done = self._asked
        return done.is_set() or loop is not self._loop()

    def _run_in_pool(self, act: Any) -> threading.Event | None:
        """Call something where the pool may be touched: on its event loop, if it has one."""
        loop = self._loop() if self._resizer.pool._is_asyncio else None
        if loop is None or loop is asyncio._get_running_loop():
            act()
            return None
        done = threading.Event()

        def run() -> None:
            try:
                act()
            except Exception as error:
                self._probe.guard.failed(error)
            finally:
                done.set()

        self._asked = loop, done
        try:
            loop.call_soon_threadsafe(run)
        except RuntimeError:  # closed in between
            return None
        return done

    def _disposed(self, engine: Any) -> None:
        """Go on with the pool that replaced the one that was disposed of; what is still out of that one counts."""
        pool, resizer = engine.pool, self._resizer
        old = resizer.pool_if_there
        if self._closed or pool is old:
            return
        try:
            state: PoolState | None = None if old is None else vars(old).get(STATE_KEY)
            if state is not None and state.held:
                resizer.retire(len(state.held))
                self._owed.append(weakref.ref(old))
            reference = weakref.ref(pool)
            self._resizer = Resizer(pool, self._original, lambda: _waiting(reference()))
            self._target = max(0, min(self._target, self._claimed - self._beside()))
            self._resizer.resize(self._target)
        except Exception as error:
            self._probe.guard.failed(error)

    # ------------------------------------------------------------------ ending
    def close(self) -> None:
        """Put the original limit back. Idempotent. Waits a moment for the event loop, if that runs elsewhere."""
        from sqlalchemy import event

        engine = self._engine()
        if self._closed:
            return
        self._closed = True
        self._busy.close()
        if engine is None:
            if self._claims is not None:
                self._claims.close()
            return
        resizer = self._resizer
        if event.contains(engine, "engine_disposed", self._disposed):
            event.remove(engine, "engine_disposed", self._disposed)
        on_loop = resizer.pool._is_asyncio and self._loop() is not None

        def restore() -> None:
            records = resizer.restore()
            if on_loop or not resizer.pool._is_asyncio:
                self._close_all(resizer, records)

        done = self._run_in_pool(restore)
        if done is not None:
            done.wait(_RESTORE_SECONDS)
        if self._claims is not None:
            self._claims.close()
        limit = float(resizer.limit)
        for metric in (catalog.POOL_AUTOSIZE_MINIMUM, catalog.POOL_AUTOSIZE_MAXIMUM, catalog.POOL_AUTOSIZE_WANTED):
            self._writer.gauge(metric, self.name).set(limit)  # a range of nothing: it does not move any more
        log.info("fastapi-headroom: the pool %s has its own limit again (%s)", self.name, _limit_text(*self._original))

    def abandon(self) -> None:
        """Leave everything to the parent: this is a forked child, which begins anew when it serves."""
        self._closed = True
        if self._engine() is not None:
            self._resizer.forget()
        if self._claims is not None:
            self._claims.forget_lock()
            self._claims.abandon()


def _waiting(pool: Any) -> int:
    state: PoolState | None = None if pool is None else vars(pool).get(STATE_KEY)
    return 0 if state is None else len(state.waiting)


def _close(resizer: Resizer, record: Any) -> None:
    try:
        resizer.close(record)
    except Exception as error:
        log.debug("fastapi-headroom: a connection that the pool gave up could not be closed: %s", error)


async def _close_async(resizer: Resizer, records: list[Any]) -> None:
    from sqlalchemy.util import greenlet_spawn

    for record in records:
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await greenlet_spawn(resizer.close, record)
        except Exception as error:
            log.debug("fastapi-headroom: a connection that the pool gave up could not be closed: %s", error)


def _limit_text(size: int, overflow: int) -> str:
    if size == 0 or overflow < 0:
        return "without a limit"
    return f"{size} and {overflow} overflow" if overflow else f"{size}"
