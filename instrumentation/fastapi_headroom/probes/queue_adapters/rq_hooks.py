"""RQ inside a process: what it publishes and what its workers run.

RQ's worker forks a work-horse for each job, which ends without any farewell. A slot of the store for each of them
would look like a restart per job, so the worker itself counts: the work-horse leaves a note of its job in a page of
memory that both share, and the worker reads it when the work-horse is gone. One that was killed before it could
finish its note is a run with the error type ``WorkHorseKilled``. SimpleWorker runs jobs in its own process and
takes the same way; SpawnWorker shares no memory with its work-horses, its jobs are not measured.

The span of a run is the worker's too, for the same reason: it begins before the fork, so that it is the current one
in the work-horse, and ends when that is gone, however it went.

The wait of a job runs from its ``enqueued_at`` to its start, by the clocks of two hosts: where they disagree by more
than the wait it counts as 0. Jobs of queues with ``is_async=False`` are run in place and not counted.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any, Final

from rq import Queue, SimpleWorker, Worker
from rq.job import Job, JobStatus, Retry

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.probes.patches import Patches
from fastapi_headroom.probes.queue_adapters import publishing, rq_trace
from fastapi_headroom.probes.queue_adapters.publishing import Publication, Publishing
from fastapi_headroom.probes.queue_adapters.redis_link import SYSTEM
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.tracing import jobs, spans

PUBLISHING: Final = ("enqueue_call", "enqueue_job", "enqueue_many", "schedule_job")
"""The methods of Queue that all ways to hand a job over go through. Some of them call each other."""
KILLED: Final = "WorkHorseKilled"


class Note:
    """What a job leaves for the worker: a small document in memory that survives a fork."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._page = mmap.mmap(-1, mmap.PAGESIZE)

    def clear(self) -> None:
        """Forget the job before."""
        self._page[0] = 0

    def write(self, **facts: Any) -> None:
        """Add facts to those that are there. Their JSON must be shorter than a page."""
        text = json.dumps(self.read() | facts).encode()
        self._page[0 : len(text) + 1] = text + b"\0"

    def read(self) -> dict[str, Any]:
        """Return the facts, none when nothing was written or a writer was killed halfway."""
        text = self._page[: self._page.find(b"\0")]
        try:
            facts = json.loads(text)
        except ValueError:
            return {}
        return facts if isinstance(facts, dict) else {}


class RQHooks:
    """Hooks on RQ's queues, jobs and workers of this process."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._writer: Writer | None = None
        self._attached = False
        self._patches = Patches()
        self._publishing = Publishing(guard)
        self._queues, self._tasks, self._errors = BoundedNames(), BoundedNames(), BoundedNames()
        self._note: Note | None = None

    def bind(self, writer: Writer) -> None:
        """Write to ``writer`` from now on, and attach if that was not done before."""
        self._writer = writer
        self._publishing.bind(writer)
        if self._attached:
            return
        self._attached = True
        for name in PUBLISHING:
            self._patches.wrap(Queue, name, self._wrap_publish)
        for owner in {_owner(Worker, "execute_job"), _owner(SimpleWorker, "execute_job")}:
            self._patches.wrap(owner, "execute_job", self._wrap_execute)
        rq_trace.attach(self._patches, self._guard)
        self._patches.wrap(Job, "perform", self._wrap_perform)
        self._patches.wrap(Job, "retry", self._wrap_retry)
        self._patches.wrap(_owner(Worker, "handle_job_retry"), "handle_job_retry", self._wrap_returned_retry)

    def close(self) -> None:
        """Detach from everything."""
        self._writer = None
        self._publishing.bind(None)
        if self._attached:
            self._attached = False
            self._patches.restore()

    # ------------------------------------------------------------ publishing

    def _wrap_publish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def publish(queue: Any, *args: Any, **kwargs: Any) -> Any:
            # Within another one, in place, or put into a pipeline that somebody else sends: nothing to time.
            idle = self._writer is None or publishing.current.get() or not getattr(queue, "is_async", True)
            if idle or kwargs.get("pipeline") is not None:
                return original(queue, *args, **kwargs)
            with Publication(self._publishing, SYSTEM, str(queue.name)):
                return original(queue, *args, **kwargs)

        return publish

    # --------------------------------------------------- running: in the worker

    def _wrap_execute(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def execute_job(worker: Any, job: Any, queue: Any) -> Any:
            note = self._prepare(worker)
            if note is None:
                return original(worker, job, queue)
            span = self._begin(job) if spans.active else None
            started = time.perf_counter()
            try:
                return original(worker, job, queue)
            finally:
                self._finished(note, job, time.perf_counter() - started, span)

        return execute_job

    def _prepare(self, worker: Any) -> Note | None:
        """Return the note for the next job, None when its work-horse could not write to it."""
        try:
            if self._writer is None or any(kind.__name__ == "SpawnWorker" for kind in type(worker).__mro__):
                return None
            if self._note is None or self._note.pid != os.getpid():  # a page is one worker's own
                self._note = Note()
            self._note.clear()
            return self._note
        except Exception as error:
            self._guard.failed(error)
            return None

    def _begin(self, job: Any) -> jobs.JobSpan | None:
        try:
            name, task = self._queues(str(job.origin)), self._tasks(_task(job))
            return jobs.begin(rq_trace.carried(job).get, SYSTEM, name, task, str(job.id))
        except Exception as error:
            self._guard.failed(error)
            return None

    def _finished(self, note: Note, job: Any, elapsed: float, span: jobs.JobSpan | None) -> None:
        try:
            facts = note.read()
            if span is not None:
                span.end(self._errors(facts.get("error", KILLED)) if facts.get("error", KILLED) else "")
            if (writer := self._writer) is None:
                return
            queue, task = self._queues(str(job.origin)), self._tasks(_task(job))
            retries = writer.counter(catalog.QUEUE_RETRIES, SYSTEM, queue, task)  # there with 0 from the first run
            if facts.get("retried"):
                retries.inc()
            if (wait := facts.get("wait")) is not None:
                writer.histogram(catalog.QUEUE_WAIT, SYSTEM, queue).observe(wait)
            error = self._errors(facts.get("error", KILLED)) if facts.get("error", KILLED) else ""
            run = writer.histogram(catalog.PROCESS_DURATION, SYSTEM, queue, task, error)
            run.observe(facts.get("run", elapsed))
            if span is not None and (ids := span.sampled) is not None:
                writer.exemplar(run, facts.get("run", elapsed), *ids)
        except Exception as failure:
            self._guard.failed(failure)

    # ----------------------------------------------- running: in the work-horse

    def _wrap_perform(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def perform(job: Any) -> Any:
            note = self._note
            if note is None or job.worker_name in (None, "sync"):
                return original(job)
            self._take_note(note, wait=_wait(job))
            started = time.perf_counter()
            try:
                outcome = original(job)
            except BaseException as error:
                self._take_note(note, run=time.perf_counter() - started, error=type(error).__name__[:200])
                raise
            error_type = "Retry" if isinstance(outcome, Retry) else ""
            self._take_note(note, run=time.perf_counter() - started, error=error_type)
            return outcome

        return perform

    def _wrap_retry(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def retry(job: Any, *args: Any, **kwargs: Any) -> Any:
            outcome = original(job, *args, **kwargs)
            self._take_note(self._note, retried=True)
            return outcome

        return retry

    def _wrap_returned_retry(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def handle_job_retry(worker: Any, job: Any, *args: Any, **kwargs: Any) -> Any:
            outcome = original(worker, job, *args, **kwargs)
            # One too many is a failure for good.
            if getattr(job, "_status", None) != JobStatus.FAILED:
                self._take_note(self._note, retried=True)
            return outcome

        return handle_job_retry

    def _take_note(self, note: Note | None, **facts: Any) -> None:
        if note is None:
            return
        try:
            note.write(**facts)
        except Exception as error:
            self._guard.failed(error)


def _owner(kind: type, name: str) -> type:
    """Return the class that defines a method: RQ moves them between its worker classes."""
    return next(owner for owner in kind.__mro__ if name in vars(owner))


def _task(job: Any) -> str:
    """Return the name of a job's function, which RQ reads from data that may be broken."""
    try:
        return str(job.func_name)
    except Exception:
        return OTHER


def _wait(job: Any) -> float | None:
    """Return the seconds from a job's enqueueing to now, None where it does not tell."""
    moment = job.enqueued_at
    if moment is None:
        return None
    enqueued: float = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return max(0.0, time.time() - enqueued)
