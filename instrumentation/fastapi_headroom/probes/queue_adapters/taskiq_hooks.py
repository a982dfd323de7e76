"""TaskIQ inside a process: what it publishes and what its receivers run.

``AsyncKicker.kiq`` is the way out: what the app sends, and what a retry middleware sends again. The message takes two
labels of ours with it: since when it can be run, and the trace context of who sent it. A retry keeps the old
context where no span is current. What ``InMemoryBroker`` runs in place is neither published nor counted.

A run is one ``Receiver.run_task``. It returns a result that holds the error, unless a retry middleware put another
in its place: so the task's function is wrapped for the run, which also takes the time of the function alone. In a
process pool, where functions must be found by their names, it is not: the error type of a retry is ``NoResultError``.
A message that is sent again meanwhile is a retry, by a middleware or by ``Context.requeue``.

The wait runs from that label to the start, by the clocks of two hosts: where they disagree by more than the wait it
counts as 0. A message from a publisher without these hooks has none.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from taskiq.context import Context
from taskiq.exceptions import NoResultError
from taskiq.kicker import AsyncKicker
from taskiq.receiver import Receiver

from fastapi_headroom.probes.queue_adapters import publishing
from fastapi_headroom.probes.queue_adapters.job_hooks import JobHooks
from fastapi_headroom.probes.queue_adapters.publishing import Publication
from fastapi_headroom.probes.queue_adapters.runs import NOTHING, Run, error_name
from fastapi_headroom.probes.queue_adapters.times import READY_AT
from fastapi_headroom.tracing import spans

TRACE: Final = "headroom_trace"
"""Label of a message: the trace context, as JSON."""
_SYSTEMS: Final = {"taskiq_redis": "redis", "taskiq_aio_pika": "rabbitmq", "taskiq_nats": "nats",
                   "taskiq_aio_kafka": "kafka", "taskiq_aio_sqs": "aws_sqs"}  # fmt: skip
"""``messaging_system`` by the package of the broker's class."""
_OWN_TRACES: Final = "taskiq.middlewares.opentelemetry_middleware"
_IN_PLACE: Final = "taskiq.brokers.inmemory_broker"


class _Job:
    """A task under way in ``run_task``."""

    __slots__ = ("again", "error", "id", "run")

    def __init__(self, task_id: str, run: Run) -> None:
        self.id, self.run = task_id, run
        self.error: BaseException | None = None
        self.again = False


_job: ContextVar[_Job | None] = ContextVar("headroom_taskiq_job", default=None)


class TaskiqHooks(JobHooks):
    """Hooks on TaskIQ's kickers and receivers of this process."""

    def _attach(self) -> None:
        self._patches.wrap(AsyncKicker, "kiq", self._wrap_kiq)
        self._patches.wrap(AsyncKicker, "_prepare_message", self._wrap_prepare)
        self._patches.wrap(Context, "requeue", self._wrap_requeue)
        self._patches.wrap(Receiver, "run_task", self._wrap_run)

    # ------------------------------------------------------------ publishing

    def _wrap_kiq(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def kiq(kicker: Any, *args: Any, **kwargs: Any) -> Any:
            where = None if self._publishing.writer is None else self._where(kicker.broker, kicker.labels)
            if where is None:
                return await original(kicker, *args, **kwargs)
            with Publication(self._publishing, *where):
                return await original(kicker, *args, **kwargs)

        return kiq

    def _wrap_prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _prepare_message(kicker: Any, *args: Any, **kwargs: Any) -> Any:
            message = original(kicker, *args, **kwargs)
            try:
                job = _job.get()
                if job is not None and job.id == message.task_id:
                    job.again = True
                publication = publishing.current.get()
                if publication is not None and publication.publishing is self._publishing:
                    _label(message.labels, delays=publication.system == "rabbitmq")
            except Exception as error:
                self._guard.failed(error)
            return message

        return _prepare_message

    def _wrap_requeue(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def requeue(context: Any) -> Any:
            where = None if self._publishing.writer is None else self._where(context.broker, context.message.labels)
            if where is None:
                return await original(context)
            if (job := _job.get()) is not None:
                job.again = True
            context.message.labels[READY_AT] = f"{time.time():.6f}"
            with Publication(self._publishing, *where):
                return await original(context)

        return requeue

    def _where(self, broker: Any, labels: Any) -> tuple[str, str] | None:
        """Return the system and the queue that a message goes to, None where it is run in place."""
        try:
            system = _system(broker)
            return None if system is None else (system, _queue(broker, labels))
        except Exception as error:
            self._guard.failed(error)
            return None

    # --------------------------------------------------------------- running

    def _wrap_run(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def run_task(receiver: Any, target: Callable[..., Any], message: Any, *args: Any, **kwargs: Any) -> Any:
            job = self._begin(receiver, message)
            if job is None:
                return await original(receiver, target, message, *args, **kwargs)
            outer = _job.get()
            _job.set(job)
            error = "CancelledError"  # until it returns
            try:
                measured = target if receiver.is_process_pool else _measured(target, job)
                result = await original(receiver, measured, message, *args, **kwargs)
                error = _outcome(job, result.error, message.labels)
                return result
            finally:
                _job.set(outer)
                job.run.end(error, retried=job.again)

        return run_task

    def _begin(self, receiver: Any, message: Any) -> _Job | None:
        if self._runs.writer is None:
            return None
        try:
            where = self._where(receiver.broker, message.labels)
            if where is None:
                return None
            try:
                ready = float(message.labels[READY_AT])
            except (KeyError, TypeError, ValueError):
                ready = None
            carried = _carried(receiver.broker, message.labels) if spans.active else NOTHING
            run = self._runs.begin(*where, str(message.task_name), ready, str(message.task_id), carried)
            return None if run is None else _Job(str(message.task_id), run)
        except Exception as error:
            self._guard.failed(error)
            return None


def _label(labels: dict[str, Any], delays: bool) -> None:
    """Add our labels to a message's. ``delays``: its broker heeds the label ``delay`` (seconds)."""
    try:
        delay = float(labels.get("delay") or 0.0) if delays else 0.0
    except (TypeError, ValueError):
        delay = 0.0  # the broker says what is wrong with it
    labels[READY_AT] = f"{time.time() + delay:.6f}"
    if spans.active:
        carrier: dict[str, str] = {}
        spans.inject(carrier)
        if carrier:
            labels[TRACE] = json.dumps(carrier)


def _carried(broker: Any, labels: Any) -> Mapping[str, Any] | None:
    """Return the trace context of a message, None where TaskIQ's own middleware makes the span of a run."""
    if any(type(middleware).__module__ == _OWN_TRACES for middleware in broker.middlewares):
        return None
    try:
        carried = json.loads(labels.get(TRACE) or "{}")
    except (ValueError, TypeError):
        return NOTHING
    return carried if isinstance(carried, dict) else NOTHING


def _measured(target: Callable[..., Any], job: _Job) -> Callable[..., Any]:
    """Return a task's function that leaves with the job when it ended and what it raised."""
    if asyncio.iscoroutinefunction(target):

        @functools.wraps(target)
        async def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return await target(*args, **kwargs)
            except BaseException as error:
                job.error = error
                raise
            finally:
                job.run.ended = time.perf_counter()

        return run

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except BaseException as error:
            job.error = error
            raise
        finally:
            job.run.ended = time.perf_counter()

    return call


def _outcome(job: _Job, error: BaseException | None, labels: Any) -> str:
    """Return the error type of a run: the result's, or of what the function raised where a retry hid that."""
    if isinstance(error, NoResultError):
        if job.error is None or isinstance(job.error, NoResultError):
            return error_name(error) if job.again else ""  # it said itself that there is no result
        if isinstance(job.error, asyncio.CancelledError) and labels.get("timeout") is not None:
            return "TimeoutError"
        return error_name(job.error)
    return error_name(error)


def _system(broker: Any) -> str | None:
    """Return the messaging system of a broker, None of one that runs tasks in place."""
    for kind in type(broker).__mro__:
        if kind.__module__ == _IN_PLACE:
            return None
        if (system := _SYSTEMS.get(kind.__module__.partition(".")[0])) is not None:
            return system
    return "taskiq"


def _queue(broker: Any, labels: Any) -> str:
    """Return the queue that a message with these labels lies in."""
    queues = getattr(broker, "_task_queues", None)  # taskiq-aio-pika's: a single one takes everything
    if isinstance(queues, list) and len(queues) == 1:
        return str(queues[0].name)
    label = getattr(broker, "_label_for_routing", "queue_name")
    return str(labels.get(label) or getattr(broker, "queue_name", None) or "taskiq")
