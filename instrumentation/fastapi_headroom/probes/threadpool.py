"""AnyIO's threadpool, where sync endpoints and dependencies run: tokens, the wait for one, the time in the thread.

``asyncio.to_thread`` and ``loop.run_in_executor`` use threads of their own: see ``executor``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from types import TracebackType
from typing import Any

from anyio._backends._asyncio import AsyncIOBackend

from fastapi_headroom import catalog
from fastapi_headroom.ledger import THREADPOOL, THREADPOOL_WAIT, Ledger, current
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.executor import timed_submit
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Gauge, Histogram, Writer


class Threadpool:
    """Measures how long a task waits for a thread, and reads the pool's tokens.

    The wait is measured by handing AnyIO's own entry to the pool a limiter that times the real one. The histogram
    has the waits for the default limiter, the one that the tokens are of; a request's ledger has all of them, and
    from the token to the end of the call it has the stage ``threadpool``.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._patches = Patches()
        self._writer: Writer | None = None
        self._wait: Histogram | None = None
        self._used: Gauge | None = None
        self._limit: Gauge | None = None
        self._waiting: Gauge | None = None

    def bind(self, writer: Writer) -> None:
        """Resolve the handles and wrap AnyIO's entry to the pool."""
        self._used = self._limit = self._waiting = None
        self._writer = writer
        if self._wait is None:
            self._patches.wrap(AsyncIOBackend, "run_sync_in_worker_thread", self._measured)
            self._patches.wrap(ThreadPoolExecutor, "submit", lambda original: timed_submit(original, self._guard))
        self._wait = writer.histogram(catalog.THREADPOOL_WAIT)

    def sample(self) -> None:
        """Write the tokens of the running loop's pool. Call it on the loop's thread."""
        writer = self._writer
        if writer is None:
            return
        limiter = AsyncIOBackend.current_default_thread_limiter()
        if self._used is None or self._limit is None or self._waiting is None:
            self._used, self._limit, self._waiting = (
                writer.gauge(catalog.THREADPOOL_TOKENS, state) for state in ("used", "limit", "waiting")
            )
        self._used.set(limiter.borrowed_tokens)
        self._limit.set(limiter.total_tokens)
        self._waiting.set(limiter.statistics().tasks_waiting)

    def close(self) -> None:
        """Put AnyIO's entry back."""
        self._patches.restore()
        self._wait = self._writer = None

    def observe(self, seconds: float, *, default: bool) -> None:
        """Take note of one wait."""
        if self._wait is not None and default:
            self._wait.observe(seconds)

    def _measured(self, original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
        entry = original.__func__

        def run_sync_in_worker_thread(
            cls: type[AsyncIOBackend], func: Any, args: Any, abandon_on_cancel: bool = False, limiter: Any = None
        ) -> Any:
            if self._wait is not None:
                try:
                    limiter = TimedLimiter(limiter or cls.current_default_thread_limiter(), limiter is None, self)
                except Exception as error:
                    self._guard.failed(error)
            return entry(cls, func, args, abandon_on_cancel, limiter)

        return classmethod(run_sync_in_worker_thread)

    def failed(self, error: Exception) -> None:
        """Take note of an error of ours."""
        self._guard.failed(error)


class TimedLimiter:
    """A limiter for one call that times how long the real one makes it wait, and how long the token is kept."""

    __slots__ = ("_default", "_ledger", "_limiter", "_pool")

    def __init__(self, limiter: Any, default: bool, pool: Threadpool) -> None:
        self._limiter, self._default, self._pool = limiter, default, pool
        self._ledger: Ledger | None = None

    async def __aenter__(self) -> None:
        ledger = current.get()
        start = perf_counter()
        if ledger is None:
            await self._wait(start)
            return
        ledger.enter(THREADPOOL_WAIT)
        try:
            await self._wait(start)
        finally:
            ledger.leave(THREADPOOL_WAIT)
        ledger.enter(THREADPOOL)  # only with a token: without one there is no end to leave it at
        self._ledger = ledger

    async def _wait(self, start: float) -> None:
        try:
            await self._limiter.__aenter__()
        finally:
            try:
                self._pool.observe(perf_counter() - start, default=self._default)
            except Exception as error:
                self._pool.failed(error)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ledger is not None:
            self._ledger.leave(THREADPOOL)
        await self._limiter.__aexit__(kind, error, traceback)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._limiter, name)
