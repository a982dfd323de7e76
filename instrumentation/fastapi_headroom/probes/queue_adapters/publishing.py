"""Handing a job over, as all adapters time it: a series of its own, and the stage ``publish`` of the request.

What a library does on the way (Redis commands, AMQP frames, an HTTP call) belongs to that stage alone: a wait that
both ``publish`` and ``cache`` had open would be halved between them, and a connection's reader task that is born here
would be taken for the request's own. So until the job is handed over other probes see a ledger of the same route
whose books are closed.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from types import TracebackType

from fastapi_headroom import catalog, ledger
from fastapi_headroom.ledger import Ledger
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.store.writer import Histogram, Writer


class Publishing:
    """Times what one library publishes in this process."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.writer: Writer | None = None
        self._queues = BoundedNames()
        self._handles: dict[tuple[str, str], Histogram] = {}

    def bind(self, writer: Writer | None) -> None:
        """Write to ``writer`` from now on; None: time nothing."""
        self._handles = {}
        self.writer = writer

    def observe(self, system: str, queue: str, seconds: float) -> None:
        """Count one hand-over. Never raises."""
        if (writer := self.writer) is None:
            return
        try:
            handle = self._handles.get((system, queue))
            if handle is None:
                name = self._queues(queue)
                handle = writer.histogram(catalog.PUBLISH_DURATION, system, "publish", name)
                if name != OTHER:
                    self._handles[system, queue] = handle
            handle.observe(seconds)
        except Exception as error:
            self.guard.failed(error)


class Publication:
    """One hand-over under way: ``with Publication(publishing, "redis", "mail"): ...``, also around an ``await``.

    A library that learns only on the way where the job goes gives no ``queue`` and sets it later; one that never
    got a queue is not counted. An exception passes through and its time counts.
    """

    __slots__ = ("_inner", "_outer", "_request", "_started", "publishing", "queue", "system")

    def __init__(self, publishing: Publishing, system: str = "", queue: str | None = None) -> None:
        self.system, self.queue = system, queue
        self.publishing = publishing

    def __enter__(self) -> Publication:
        self._outer = current.get()
        current.set(self)
        self._request = request = ledger.current.get()
        if request is not None:
            request.enter(ledger.PUBLISH)
            self._inner = _closed(request)
            ledger.current.set(self._inner)
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        elapsed = time.perf_counter() - self._started
        if self._request is not None:
            if ledger.current.get() is self._inner:  # a coroutine that was thrown away is closed in another context
                ledger.current.set(self._request)
            self._request.leave(ledger.PUBLISH)
        if current.get() is self:
            current.set(self._outer)
        if self.queue is not None:
            self.publishing.observe(self.system, self.queue, elapsed)


def _closed(request: Ledger) -> Ledger:
    """Return a ledger that tells the request's route and takes no time."""
    closed = Ledger(request.method, request.started)
    closed.route, closed.prefix, closed.finished = request.route, request.prefix, True
    return closed


current: ContextVar[Publication | None] = ContextVar("headroom_publication", default=None)
"""The hand-over that this code takes part in."""
