"""Starlette's BackgroundTasks: how many run now, how long each waited and took, and how many failed.

They run inside the ASGI call after the last byte of the response, so a slow one delays no client and shows in
no request duration; it still holds the worker, its connections and, when it blocks, the loop.

The tasks of one response run one after the other. A task's wait begins when the request makes it, so it holds the
rest of the request, the sending of the response and the tasks before it. A task that was made outside of any
request (one object for all responses) has no such moment and no wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from starlette.background import BackgroundTask

from fastapi_headroom import catalog, ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Counter, Gauge, Histogram, Writer

Call = Callable[[BackgroundTask], Coroutine[Any, Any, None]]
Handles = tuple[Gauge, Histogram, Histogram, Counter]
_MADE = "_headroom_made"
"""Attribute of a task: when a request made it, in seconds of ``perf_counter``."""
_CACHED_NAMES = 1_000
"""Names whose handles are kept; functions made on the fly could otherwise fill the memory."""


class BackgroundTaskHooks:
    """Wraps ``BackgroundTask.__call__`` once for all tasks (``BackgroundTasks`` calls it for each of its own)."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._writer: Writer | None = None
        self._names = BoundedNames()
        self._handles: dict[tuple[str, str], Handles] = {}
        self._patches = Patches()
        self._attached = False

    def bind(self, writer: Writer) -> None:
        """Write to ``writer`` from now on, and wrap if that was not done before."""
        self._handles = {}
        self._writer = writer
        if not self._attached:
            self._attached = True
            self._patches.wrap(BackgroundTask, "__init__", self._wrapping_init)
            self._patches.wrap(BackgroundTask, "__call__", self._wrapping)

    def close(self) -> None:
        """Put the original back."""
        self._writer = None
        self._handles = {}
        self._attached = False
        self._patches.restore()

    def _wrapping_init(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(task: BackgroundTask, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(task, *args, **kwargs)
            if self._writer is not None and ledger.current.get() is not None:
                setattr(task, _MADE, perf_counter())

        return __init__

    def _wrapping(self, original: Call) -> Call:
        async def __call__(task: BackgroundTask) -> None:  # noqa: N807 - the name that tracebacks and tools show
            handles = self._handles_of(task)
            if handles is None:
                await original(task)
                return
            running, duration, wait, failures = handles
            running.inc()
            started = perf_counter()
            made = vars(task).pop(_MADE, None)
            if made is not None:
                wait.observe(started - made)
            try:
                await original(task)
            except Exception:
                failures.inc()
                raise
            finally:
                running.dec()
                duration.observe(perf_counter() - started)

        return __call__

    def _handles_of(self, task: BackgroundTask) -> Handles | None:
        if (writer := self._writer) is None:
            return None
        try:
            key = _key(task.func)
            handles = self._handles.get(key)
            if handles is None:
                name = self._names(".".join(part for part in key if part))
                handles = (
                    writer.gauge(catalog.BACKGROUND_TASKS, name),
                    writer.histogram(catalog.BACKGROUND_TASK_DURATION, name),
                    writer.histogram(catalog.BACKGROUND_TASK_WAIT, name),
                    writer.counter(catalog.BACKGROUND_TASK_FAILURES, name),
                )
                if len(self._handles) < _CACHED_NAMES:
                    self._handles[key] = handles
        except Exception as error:
            self._guard.failed(error)
            return None
        return handles


def _key(func: Any) -> tuple[str, str]:
    """Return module and qualified name of what a task calls; looks through ``functools.partial``."""
    while (inner := getattr(func, "func", None)) is not None:
        func = inner
    name = getattr(func, "__qualname__", None)
    if name is None:  # an object with __call__
        func = type(func)
        name = func.__qualname__
    return getattr(func, "__module__", None) or "", name
