"""The main process of a Celery worker: which queues it takes jobs from, and the runs that its children cannot report.

A broker on Redis does not know who consumes a queue, so the worker says it: one consumer per queue that it takes
jobs from, as long as it lives and is connected. The store leaves a dead worker's gauges out, so the last one to die
takes the series with it. RabbitMQ knows its consumers, and the poller asks it.

A child that is killed, at a hard time limit or for want of memory, ends without a word. Its parent sees that and
counts a run with the error type ``TimeLimitExceeded`` or ``WorkerLostError``.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import jobs, spans

if TYPE_CHECKING:
    from celery.app.base import Celery

ALL: Final = "_all"
KNOWN_BY_BROKER: Final = frozenset({"rabbitmq"})
"""Systems whose broker tells the consumers of a queue to the poller."""
HARD_LIMIT: Final = "TimeLimitExceeded"
LOST: Final = "WorkerLostError"
_ENDS: Final = {HARD_LIMIT: HARD_LIMIT, LOST: LOST, "SystemExit": LOST, "KeyboardInterrupt": LOST,
                "MemoryError": "MemoryError"}  # fmt: skip
"""Error types of runs that ended their process, by the exception that the main process is told."""
_COUNTED: Final = "headroom_counted"
"""Attribute of a worker's request whose lost run was counted: Celery tells of some twice."""
_serving: tuple[int, Any] | None = None


def serve(consumer: Any) -> None:
    """Remember the consumer of this process, which is a worker's main process."""
    global _serving
    _serving = (os.getpid(), consumer)


class Labels(Protocol):
    """Names a run as the hooks on tasks do."""

    def system(self, app: Celery) -> str:
        """Return ``messaging_system``."""

    def queue(self, request: Any) -> str:
        """Return the queue that a run's job came from."""

    def task(self, name: str) -> str:
        """Return the task's name, within the limit of names."""


class CeleryWorker:
    """Measures the main process of a worker; does nothing in any other process."""

    def __init__(self, guard: Guard, labels: Labels) -> None:
        self._guard, self._labels = guard, labels
        self._writer: Writer | None = None
        self._patches = Patches()
        self._attached = False
        self._reported: set[tuple[str, str]] = set()

    def bind(self, writer: Writer) -> None:
        """Write to ``writer`` from now on."""
        self._writer, self._reported = writer, set()
        if _consumer() is None:
            return
        if not self._attached:
            from celery.worker.request import Request

            self._attached = True
            self._patches.wrap(Request, "on_timeout", self._wrap_timeout)
            self._patches.wrap(Request, "on_failure", self._wrap_failure)
        self.sample()

    def sample(self) -> None:
        """Write which queues the worker takes jobs from now."""
        writer, consumer = self._writer, _consumer()
        if writer is None or consumer is None:
            return
        system = self._labels.system(consumer.app)
        if system in KNOWN_BY_BROKER:
            return
        taken = {(system, name) for name in _queues(consumer)}
        self._reported |= taken
        for key in self._reported:
            writer.gauge(catalog.QUEUE_CONSUMERS, *key, ALL).set(float(key in taken))

    def close(self) -> None:
        """Detach."""
        self._writer = None
        if self._attached:
            self._attached = False
            self._patches.restore()

    def _wrap_timeout(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def on_timeout(request: Any, soft: bool, timeout: float) -> Any:
            if not soft:
                self._lost(request, HARD_LIMIT)
            return original(request, soft, timeout)

        return on_timeout

    def _wrap_failure(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def on_failure(request: Any, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
            error = getattr(exc_info, "exception", None)
            told = _ENDS.get(type(getattr(error, "exc", error)).__name__)
            # A job that was revoked or given back was ended on purpose.
            if told and not (request._already_cancelled or request._already_revoked):
                self._lost(request, told)
            return original(request, exc_info, *args, **kwargs)

        return on_failure

    def _lost(self, request: Any, error_type: str) -> None:
        """Count a run whose child is gone."""
        try:
            if (writer := self._writer) is None or getattr(request, _COUNTED, False):
                return
            setattr(request, _COUNTED, True)
            now, began = time.time(), request.time_start or time.time()
            key = (self._labels.system(request.app), self._labels.queue(request), self._labels.task(request.type))
            writer.histogram(catalog.PROCESS_DURATION, *key, error_type).observe(max(0.0, now - began))
            if spans.active:
                start = int(began * 1e9)
                span = jobs.begin(request.request_dict.get, *key, str(request.id), start_ns=start)
                if span is not None:
                    span.end(error_type, max(start, int(now * 1e9)))
        except Exception as error:
            self._guard.failed(error)


def parent_counts() -> bool:
    """Return whether this process is a worker's child, whose parent counts the run that ends it."""
    return _consumer() is None


def _consumer() -> Any:
    """Return the consumer of this process; None in a worker's children, and where no worker runs."""
    return _serving[1] if _serving is not None and _serving[0] == os.getpid() else None


def _queues(consumer: Any) -> list[str]:
    """Return the queues that jobs are taken from; none while the worker has no connection."""
    tasks, connection = consumer.task_consumer, consumer.connection
    if tasks is None or connection is None or not connection.connected:
        return []
    return [str(queue.name) for queue in list(tasks.queues)]
