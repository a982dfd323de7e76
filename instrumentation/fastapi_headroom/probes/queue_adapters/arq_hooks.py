"""arq inside a process: what it publishes and what its worker runs.

``Worker.run_job`` keeps what a job raises to itself, so the job's own task tells how it ended: a run leaves it in the
worker's ``job_tasks``, and a dictionary of ours in that place sees it come. Whether the job is run again is what the
worker tells ``finish_job``. A task that was cancelled and not to be run again has timed out, or was aborted.

A run begins when the job was read from Redis. A job that arq gives up before its function is called (too many tries,
an unknown function, expired) is a run with the error type ``JobExecutionFailed``.

The wait runs from when the job was due, or enqueued where that is later. One that is given back without a time keeps
its old one in Redis; the worker that gave it back knows better, another worker counts the earlier tries as waiting.

A queue has a name of the user's choice: workers that poll it and jobs that are asked for their state tell it to the
cache probe, for which it is no look-up.

The trace context goes with the job in a field of its own beside arq's; workers without these hooks do not look at it.
"""

from __future__ import annotations

import asyncio
import functools
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakSet

import arq.connections
import arq.worker
from arq.connections import ArqRedis
from arq.jobs import Job
from arq.worker import Worker

from fastapi_headroom.probes import cache_books
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER
from fastapi_headroom.probes.queue_adapters.job_hooks import JobHooks
from fastapi_headroom.probes.queue_adapters.publishing import Publication
from fastapi_headroom.probes.queue_adapters.redis_link import SYSTEM
from fastapi_headroom.probes.queue_adapters.runs import Run, error_name
from fastapi_headroom.tracing import spans

FIELD: Final = "headroom_trace"
"""Where a job keeps the trace context, beside arq's own fields."""
GIVEN_UP: Final = "JobExecutionFailed"
REMEMBERED: Final = 1_000
"""Jobs that were given back of which a worker remembers when, at most."""


class _Job:
    """A job under way in ``run_job``."""

    __slots__ = ("aborted", "again", "id", "run", "score", "task", "worker")

    def __init__(self, worker: Any, job_id: str, score: float) -> None:
        self.worker, self.id, self.score = worker, job_id, score
        self.run: Run | None = None
        self.task: asyncio.Task[Any] | None = None
        self.again = self.aborted = False


_job: ContextVar[_Job | None] = ContextVar("headroom_arq_job", default=None)


class _JobTasks(dict[str, "asyncio.Task[Any]"]):
    """A worker's ``job_tasks`` that tells when the task of a job is there."""

    def __init__(self, hooks: ArqHooks, tasks: dict[str, asyncio.Task[Any]]) -> None:
        super().__init__(tasks)
        self._hooks = hooks

    def __setitem__(self, job_id: str, task: asyncio.Task[Any]) -> None:
        super().__setitem__(job_id, task)
        self._hooks.started(task)


class ArqHooks(JobHooks):
    """Hooks on arq's clients and workers of this process."""

    def __init__(self, guard: Guard) -> None:
        super().__init__(guard)
        self._workers: WeakSet[Any] = WeakSet()
        self._given_back: OrderedDict[str, float] = OrderedDict()

    def _attach(self) -> None:
        self._patches.wrap(ArqRedis, "enqueue_job", self._wrap_enqueue)
        self._patches.wrap(arq.connections, "serialize_job", self._wrap_serialize)
        self._patches.wrap(arq.worker, "deserialize_job_raw", self._wrap_deserialize)
        self._patches.wrap(Worker, "run_job", self._wrap_run)
        self._patches.wrap(Worker, "finish_job", self._wrap_finish)
        self._patches.wrap(Job, "__init__", self._wrap_job)
        if "_poll_iteration" in vars(Worker):
            self._patches.wrap(Worker, "_poll_iteration", self._wrap_poll)

    def close(self) -> None:
        """Detach from everything."""
        super().close()
        for worker in self._workers:
            worker.job_tasks = dict(worker.job_tasks)
        self._workers.clear()

    # ------------------------------------------------------------ publishing

    def _wrap_enqueue(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def enqueue_job(client: Any, *args: Any, **kwargs: Any) -> Any:
            if self._publishing.writer is None:
                return await original(client, *args, **kwargs)
            queue = kwargs.get("_queue_name") or getattr(client, "default_queue_name", "")
            with Publication(self._publishing, SYSTEM, str(queue)):
                return await original(client, *args, **kwargs)

        return enqueue_job

    def _wrap_job(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def make(job: Any, *args: Any, **kwargs: Any) -> None:
            original(job, *args, **kwargs)
            self._mark(job, "_redis", "_queue_name")

        return make

    def _wrap_poll(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def _poll_iteration(worker: Any) -> Any:
            self._mark(worker, "pool", "queue_name")
            return await original(worker)

        return _poll_iteration

    def _mark(self, asking: Any, link: str, queue: str) -> None:
        if self._runs.writer is not None:
            try:
                cache_books.mark(getattr(asking, link), getattr(asking, queue))
            except Exception as error:
                self._guard.failed(error)

    def _wrap_serialize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def serialize_job(*args: Any, serializer: Any = None, **kwargs: Any) -> Any:
            carrier: dict[str, str] = {}
            if spans.active:
                try:
                    spans.inject(carrier)
                except Exception as error:
                    self._guard.failed(error)
            if not carrier:
                return original(*args, serializer=serializer, **kwargs)
            dump = serializer or pickle.dumps
            return original(*args, serializer=lambda fields: dump({**fields, FIELD: carrier}), **kwargs)

        return serialize_job

    # --------------------------------------------------------------- running

    def _wrap_run(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def run_job(worker: Any, job_id: str, score: int) -> Any:
            if self._runs.writer is None:
                return await original(worker, job_id, score)
            job = _Job(worker, job_id, score)
            _job.set(job)  # a task of its own: nobody else sees it
            self._watch(worker)
            try:
                return await original(worker, job_id, score)
            finally:
                self._ended(job)

        return run_job

    def _wrap_deserialize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def deserialize_job_raw(data: Any, *, deserializer: Any = None) -> Any:
            job = _job.get()
            if job is None:
                return original(data, deserializer=deserializer)
            carried: dict[str, Any] = {}

            def load(serialized: Any) -> Any:
                fields = (deserializer or pickle.loads)(serialized)
                if isinstance(fields, dict) and isinstance(fields.get(FIELD), dict):
                    carried.update(fields[FIELD])
                return fields

            found = original(data, deserializer=load)
            self._begin(job, str(found[0]), found[4], carried)
            return found

        return deserialize_job_raw

    def _begin(self, job: _Job, task: str, enqueued: Any, carried: dict[str, Any]) -> None:
        try:
            due = max(job.score, enqueued if isinstance(enqueued, int | float) else 0.0) / 1000
            ready = max(due, self._given_back.pop(job.id, 0.0))
            job.run = self._runs.begin(SYSTEM, job.worker.queue_name, task, ready, job.id, carried)
        except Exception as error:
            self._guard.failed(error)

    def _watch(self, worker: Any) -> None:
        try:
            if not isinstance(worker.job_tasks, _JobTasks):
                worker.job_tasks = _JobTasks(self, worker.job_tasks)
                self._workers.add(worker)
        except Exception as error:
            self._guard.failed(error)

    def started(self, task: asyncio.Task[Any]) -> None:
        """Take note of the task of the job that runs in this context."""
        if (job := _job.get()) is not None:
            job.task = task
            task.add_done_callback(functools.partial(_note_end, job))

    def _wrap_finish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def finish_job(worker: Any, job_id: str, finish: bool, *args: Any, **kwargs: Any) -> Any:
            if (job := _job.get()) is not None and job.id == job_id:
                job.again = not finish
            return await original(worker, job_id, finish, *args, **kwargs)

        return finish_job

    def _ended(self, job: _Job) -> None:
        try:
            if job.again:
                self._given_back[job.id] = time.time()
                if len(self._given_back) > REMEMBERED:
                    self._given_back.popitem(last=False)
            run = job.run or self._runs.begin(SYSTEM, job.worker.queue_name, OTHER, job=job.id)
            if run is not None:
                run.end(_outcome(job), retried=job.again)
        except Exception as error:
            self._guard.failed(error)


def _note_end(job: _Job, task: asyncio.Task[Any]) -> None:
    # The first to hear of the end: arq itself takes the job off its list of those to abort after this.
    if job.run is not None:
        job.run.ended = time.perf_counter()
    job.aborted = job.id in job.worker.aborting_tasks


def _outcome(job: _Job) -> str:
    """Return the error type of a job's run."""
    if job.task is None or not job.task.done():
        return GIVEN_UP
    if job.task.cancelled():
        return "CancelledError" if job.again or job.aborted else "TimeoutError"
    return error_name(job.task.exception())
