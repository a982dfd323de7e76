"""Threads outside AnyIO's pool: what a request hands to ``asyncio.to_thread`` or ``loop.run_in_executor``.

Both end in ``ThreadPoolExecutor.submit``, on asyncio as on uvloop, whose loops have no method that could be wrapped.
From there to the start in a thread is ``threadpool_wait``, from the start to the end ``threadpool``.
"""

from __future__ import annotations

from asyncio import _get_running_loop
from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from typing import Any

from fastapi_headroom.ledger import THREADPOOL, THREADPOOL_WAIT, Ledger, current
from fastapi_headroom.probes.base import Guard


def timed_submit(original: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """Return ``ThreadPoolExecutor.submit`` that charges what a request submits on its loop's thread to its ledger."""

    @wraps(original)
    def submit(executor: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        ledger = current.get()
        if ledger is None or ledger.finished or _get_running_loop() is None:
            return original(executor, fn, *args, **kwargs)
        job = Job(fn, ledger)
        ledger.enter(THREADPOOL_WAIT)
        try:
            future = original(executor, job, *args, **kwargs)
        except BaseException:  # a pool that was shut down
            ledger.leave(THREADPOOL_WAIT)
            raise
        try:
            future.add_done_callback(job.done)
        except Exception as error:  # a subclass whose futures are of another kind
            guard.failed(error)
        return future

    return submit


class Job:
    """A function on its way through a thread."""

    __slots__ = ("_fn", "_ledger")

    def __init__(self, fn: Callable[..., Any], ledger: Ledger) -> None:
        self._fn, self._ledger = fn, ledger

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ledger = self._ledger
        ledger.leave(THREADPOOL_WAIT)
        ledger.enter(THREADPOOL)
        try:
            return self._fn(*args, **kwargs)
        finally:
            ledger.leave(THREADPOOL)

    def done(self, future: Future[Any]) -> None:
        """Leave the wait of a job that was cancelled before it began."""
        if future.cancelled():
            self._ledger.leave(THREADPOOL_WAIT)
