"""Celery inside a process: what it publishes and what it runs.

Publishing is timed around ``Celery.send_task``, which all ways to send a task go through, because the signal
after publishing is not sent when publishing fails. The signals give the rest: the message's headers before it
leaves, and the start and end of each run. What only a worker's main process sees is in ``celery_worker``.

The wait of a job runs from its publishing, or its ``eta`` where that is later, to its start, by the clocks of
two hosts: where they disagree by more than the wait it counts as 0.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from celery import signals
from celery.app.base import Celery

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.queue_adapters import publishing
from fastapi_headroom.probes.queue_adapters.celery import ENQUEUED_AT
from fastapi_headroom.probes.queue_adapters.celery_worker import CeleryWorker, parent_counts
from fastapi_headroom.probes.queue_adapters.publishing import Publication, Publishing
from fastapi_headroom.probes.queue_adapters.times import parse_time
from fastapi_headroom.store.writer import Histogram, Writer
from fastapi_headroom.tracing import jobs, spans
from fastapi_headroom.urls import scheme_of

_UID = "fastapi-headroom"
_STARTED_AT = "headroom_started_at"
"""Attribute of a task's request, in seconds of ``perf_counter``."""
_SPAN = "headroom_span"
"""Attribute of a task's request: the span of the run."""
_SYSTEMS = {"redis": "redis", "rediss": "redis", "sentinel": "redis", "amqp": "rabbitmq", "amqps": "rabbitmq",
            "pyamqp": "rabbitmq", "librabbitmq": "rabbitmq", "sqs": "aws_sqs", "": "rabbitmq"}  # fmt: skip
"""``messaging_system`` by the scheme of the broker's URL; other schemes stand for themselves."""


class CeleryHooks:
    """Hooks on all Celery apps of this process."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._writer: Writer | None = None
        self._attached = False
        self._patches = Patches()
        self._queues, self._tasks, self._errors = BoundedNames(), BoundedNames(), BoundedNames()
        self._systems: WeakKeyDictionary[Celery, str] = WeakKeyDictionary()
        self._publishing = Publishing(guard)
        self._wait: dict[tuple[str, str], Histogram] = {}
        self._process: dict[tuple[str, str, str, str], Histogram] = {}
        self._worker = CeleryWorker(guard, self)

    def bind(self, writer: Writer) -> None:
        """Write to ``writer`` from now on, and attach if that was not done before."""
        self._wait, self._process = {}, {}
        self._writer = writer
        self._publishing.bind(writer)
        self._worker.bind(writer)
        if self._attached:
            return
        self._attached = True
        self._patches.wrap(Celery, "send_task", self._wrapping)
        signals.before_task_publish.connect(self._before_publish, weak=False, dispatch_uid=_UID)
        signals.task_prerun.connect(self._before_run, weak=False, dispatch_uid=_UID)
        signals.task_postrun.connect(self._after_run, weak=False, dispatch_uid=_UID)

    def sample(self) -> None:
        """Write what the main process of a worker tells."""
        self._worker.sample()

    def close(self) -> None:
        """Detach from everything."""
        self._writer = None
        self._publishing.bind(None)
        self._worker.close()
        if not self._attached:
            return
        self._attached = False
        self._patches.restore()
        for signal in (signals.before_task_publish, signals.task_prerun, signals.task_postrun):
            signal.disconnect(dispatch_uid=_UID)

    # ------------------------------------------------------------ publishing

    def _wrapping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def send_task(app: Celery, *args: Any, **kwargs: Any) -> Any:
            if self._writer is None:
                return original(app, *args, **kwargs)
            with Publication(self._publishing, self._system_of(app)):
                return original(app, *args, **kwargs)

        return send_task

    def _before_publish(self, headers: Any = None, routing_key: Any = None, declare: Any = None, **_: Any) -> None:
        if self._writer is None:
            return
        try:
            if isinstance(headers, dict):
                # Always set: a retry carries the headers of the attempt before.
                headers[ENQUEUED_AT] = time.time()
                if spans.active:
                    spans.inject(headers)
            if (publication := publishing.current.get()) is not None:
                name = getattr(declare[0], "name", None) if declare else None
                publication.queue = str(name or routing_key or "")
        except Exception as error:
            self._guard.failed(error)

    # --------------------------------------------------------------- running

    def _before_run(self, task: Any = None, **_: Any) -> None:
        if (writer := self._writer) is None:
            return
        try:
            request = task.request
            if request.is_eager:
                return  # called in place: no queue is involved
            now = time.time()
            setattr(request, _STARTED_AT, time.perf_counter())
            key = (self.system(task.app), self.queue(request))
            name = self.task(task.name)
            if spans.active and not traced_by_user():
                setattr(request, _SPAN, jobs.begin(request.get, *key, task.name, str(request.id)))
            writer.counter(catalog.QUEUE_RETRIES, *key, name)  # there with 0 from the first run
            enqueued = request.get(ENQUEUED_AT)
            if not isinstance(enqueued, int | float):
                return  # from a publisher without this hook
            ready = max(float(enqueued), (parse_time(request.eta) if isinstance(request.eta, str) else None) or 0.0)
            handle = self._wait.get(key)
            if handle is None:
                handle = self._wait[key] = writer.histogram(catalog.QUEUE_WAIT, *key)
            handle.observe(max(0.0, now - ready))
        except Exception as error:
            self._guard.failed(error)

    def _after_run(self, task: Any = None, state: Any = None, retval: Any = None, **_: Any) -> None:
        try:
            request = task.request
            started, span = request.get(_STARTED_AT), request.get(_SPAN)
            if started is None:
                return
            elapsed = time.perf_counter() - started
            error = self._error(state, retval)
            cut = state is None and parent_counts()  # the run ends this process
            if span is not None:
                setattr(request, _SPAN, None)
                span.leave() if cut else span.end(error)
            if cut or (writer := self._writer) is None:
                return
            key = (self.system(task.app), self.queue(request), self.task(task.name), error)
            handle = self._process.get(key)
            if handle is None:
                handle = self._process[key] = writer.histogram(catalog.PROCESS_DURATION, *key)
            handle.observe(elapsed)
            if span is not None and (ids := span.sampled) is not None:
                writer.exemplar(handle, elapsed, *ids)
            if state == "RETRY":
                writer.counter(catalog.QUEUE_RETRIES, *key[:3]).inc()
        except Exception as error:
            self._guard.failed(error)

    def _error(self, state: Any, outcome: Any) -> str:
        """Return the error type of a run: empty for success, the cause's type for a failure or a retry."""
        if state in ("SUCCESS", "IGNORED"):
            return ""
        if state is None:
            outcome = sys.exc_info()[1]  # SystemExit and its like, on its way through Celery
        if state == "RETRY":
            outcome = getattr(outcome, "exc", None) or outcome
        return self._errors(type(outcome).__name__) if isinstance(outcome, BaseException) else OTHER

    # ---------------------------------------------------------------- labels

    def queue(self, request: Any) -> str:
        """Return the queue of a run: Celery's own routing sends to a direct exchange by the queue's name."""
        return self._queues(str((request.delivery_info or {}).get("routing_key") or ""))

    def task(self, name: str) -> str:
        """Return a task's name, ``_OTHER`` for one too many."""
        return self._tasks(name)

    def _system_of(self, app: Celery) -> str:
        """Return the system of an app, nothing where its configuration cannot be read: it raises in its own time."""
        try:
            return self.system(app)
        except Exception:
            return ""

    def system(self, app: Celery) -> str:
        """Return the broker's kind as ``messaging_system`` says it."""
        system = self._systems.get(app)
        if system is None:
            url = str(app.conf.broker_write_url or app.conf.broker_url or "")
            scheme = scheme_of(url)
            system = self._systems[app] = _SYSTEMS.get(scheme, scheme)
        return system


def traced_by_user() -> bool:
    """Return whether OpenTelemetry's own instrumentation of Celery is on: it makes the span of a run then."""
    module = sys.modules.get("opentelemetry.instrumentation.celery")
    instrumentor = getattr(module, "CeleryInstrumentor", None)  # a singleton
    return instrumentor is not None and bool(instrumentor().is_instrumented_by_opentelemetry)
