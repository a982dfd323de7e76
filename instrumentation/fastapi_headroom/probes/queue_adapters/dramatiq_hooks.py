"""Dramatiq inside a process: what it publishes and what its worker threads run.

``Broker.enqueue`` is the one way out: what actors send, what a worker's retries put back, and what it moves from a
queue of delayed messages, which is no publishing and left alone. A message goes out as a copy with two options
of ours: since when it can be run, and the trace context of who sent it. A retry keeps the old context where no
span is current.

A run is one ``WorkerThread.process_message``. It keeps what an actor raises to itself, but tells the middleware, so the
outcome is taken from ``emit_after``; a message that is enqueued again meanwhile is a retry. One that a middleware
skipped (``SkipMessage``, as when it is too old) is a run with that error type.

The wait runs from that option to the start, by the clocks of two hosts: where they disagree by more than the wait
it counts as 0. A message from a publisher without these hooks has none.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Final

from dramatiq.broker import Broker
from dramatiq.common import q_name
from dramatiq.worker import ConsumerThread, WorkerThread

from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.queue_adapters.job_hooks import JobHooks
from fastapi_headroom.probes.queue_adapters.publishing import Publication
from fastapi_headroom.probes.queue_adapters.runs import NOTHING, Run, error_name
from fastapi_headroom.probes.queue_adapters.times import READY_AT
from fastapi_headroom.tracing import spans

TRACE: Final = "headroom_trace"
"""Option of a message: the trace context."""
SKIPPED: Final = "SkipMessage"
_BROKERS: Final = (
    ("dramatiq.brokers.redis", "RedisBroker", "redis"),
    ("dramatiq.brokers.rabbitmq", "RabbitmqBroker", "rabbitmq"),
)


class _Job:
    """A message under way in ``process_message``."""

    __slots__ = ("again", "error", "id", "run")

    def __init__(self, message_id: str, run: Run) -> None:
        self.id, self.run = message_id, run
        self.error, self.again = "", False


_job: ContextVar[_Job | None] = ContextVar("headroom_dramatiq_job", default=None)
_moving: ContextVar[bool] = ContextVar("headroom_dramatiq_moving", default=False)
"""Whether this consumer thread moves delayed messages that are due."""


class DramatiqHooks(JobHooks):
    """Hooks on Dramatiq's brokers and workers of this process."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard)
        self._systems: dict[type, str] = {}

    def _attach(self) -> None:
        for module, name, system in _BROKERS:
            try:
                kind = getattr(import_module(module), name)
            except ImportError:  # the client of that broker is not installed
                continue
            self._systems[kind] = system
            self._patches.wrap(kind, "enqueue", self._wrap_enqueue)
        self._patches.wrap(ConsumerThread, "handle_delayed_messages", self._wrap_move)
        self._patches.wrap(WorkerThread, "process_message", self._wrap_process)
        self._patches.wrap(Broker, "emit_after", self._wrap_emit_after)

    # ------------------------------------------------------------ publishing

    def _wrap_enqueue(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def enqueue(broker: Any, message: Any, *, delay: int | None = None) -> Any:
            if self._publishing.writer is None or _moving.get():
                return original(broker, message, delay=delay)
            system, queue, labelled = self._prepare(broker, message, delay)
            with Publication(self._publishing, system, queue):
                return original(broker, labelled, delay=delay)

        return enqueue

    def _prepare(self, broker: Any, message: Any, delay: int | None) -> tuple[str, str | None, Any]:
        """Return where a message goes, and a copy of it with our options."""
        try:
            job = _job.get()
            if job is not None and job.id == message.message_id:
                job.again = True
            options: dict[str, Any] = {READY_AT: time.time() + (delay or 0) / 1000}
            if spans.active:
                carrier: dict[str, str] = {}
                spans.inject(carrier)
                if carrier:
                    options[TRACE] = carrier
            return self._system(broker), q_name(str(message.queue_name)), message.copy(options=options)
        except Exception as error:
            self._guard.failed(error)
            return "", None, message

    def _wrap_move(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def handle_delayed_messages(consumer: Any) -> Any:
            _moving.set(True)
            try:
                return original(consumer)
            finally:
                _moving.set(False)

        return handle_delayed_messages

    def _system(self, broker: Any) -> str:
        return next((self._systems[kind] for kind in type(broker).__mro__ if kind in self._systems), "dramatiq")

    # --------------------------------------------------------------- running

    def _wrap_process(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def process_message(worker: Any, message: Any) -> Any:
            job = self._begin(worker, message)
            if job is None:
                return original(worker, message)
            _job.set(job)
            try:
                return original(worker, message)
            finally:
                _job.set(None)
                job.run.end(job.error, retried=job.again)

        return process_message

    def _begin(self, worker: Any, message: Any) -> _Job | None:
        if self._runs.writer is None:
            return None
        try:
            ready, carried = message.options.get(READY_AT), message.options.get(TRACE)
            run = self._runs.begin(
                self._system(worker.broker), q_name(str(message.queue_name)), str(message.actor_name),
                float(ready) if isinstance(ready, int | float) else None,
                str(message.message_id), carried if isinstance(carried, dict) else NOTHING,
            )  # fmt: skip
            return None if run is None else _Job(str(message.message_id), run)
        except Exception as error:
            self._guard.failed(error)
            return None

    def _wrap_emit_after(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def emit_after(broker: Any, signal: str, *args: Any, **kwargs: Any) -> Any:
            job = _job.get()
            if job is not None and signal in ("process_message", "skip_message"):
                job.run.ended = time.perf_counter()  # what middleware does afterwards is not the actor's time
                job.error = SKIPPED if signal == "skip_message" else error_name(kwargs.get("exception"))
            return original(broker, signal, *args, **kwargs)

        return emit_after
