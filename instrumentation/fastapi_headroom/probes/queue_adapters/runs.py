"""Runs of jobs in a worker, as the adapters measure them: wait, run time, outcome, retries, and the run's span."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.store.writer import Counter, Histogram, Writer
from fastapi_headroom.tracing import jobs, spans

NOTHING: Final[Mapping[str, Any]] = {}
"""What a job carries from a publisher that does not trace."""


class Runs:
    """Measures the runs of one library's jobs in this process. Nothing here raises."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.writer: Writer | None = None
        self._queues, self._tasks, self._errors = BoundedNames(), BoundedNames(), BoundedNames()
        self._handles: dict[tuple[str, ...], Any] = {}

    def bind(self, writer: Writer | None) -> None:
        """Write to ``writer`` from now on; None: measure nothing."""
        self._handles = {}
        self.writer = writer

    def begin(
        self,
        system: str,
        queue: str,
        task: str,
        ready: float | None = None,
        job: str = "",
        carried: Mapping[str, Any] | None = NOTHING,
    ) -> Run | None:
        """Note the start of a run of a job that was ready at ``ready`` (seconds since 1970; None: it does not tell).

        While traces are on, a span begins below the context that the job has ``carried`` and is the current one until
        ``Run.end``, to be called in the same context; not where that is None: somebody else makes the span.
        None when nothing is measured. The wait is by the clocks of two hosts: where they disagree by more than the
        wait it counts as 0.
        """
        if (writer := self.writer) is None:
            return None
        try:
            queue, task = self._queues(queue), self._tasks(task)
            self._retries(writer, system, queue, task)  # there with 0 from the first run
            if ready is not None:
                self._waits(writer, system, queue).observe(max(0.0, time.time() - ready))
            run = Run(self, system, queue, task)
            if spans.active and carried is not None:
                run.span = jobs.begin(carried.get, system, queue, task, job)
            return run
        except Exception as error:
            self.guard.failed(error)
            return None

    def end(self, run: Run, error: str, retried: bool, seconds: float) -> None:
        """Note the end of a run; ``Run.end`` calls it."""
        try:
            name = self._errors(error) if error else ""
            if run.span is not None:
                run.span.end(name)
            if (writer := self.writer) is None:
                return
            duration = self._durations(writer, run.system, run.queue, run.task, name)
            duration.observe(seconds)
            if run.span is not None and (ids := run.span.sampled) is not None:
                writer.exemplar(duration, seconds, *ids)
            if retried:
                self._retries(writer, run.system, run.queue, run.task).inc()
        except Exception as failure:
            self.guard.failed(failure)

    def _waits(self, writer: Writer, *labels: str) -> Histogram:
        return self._handle(writer.histogram, catalog.QUEUE_WAIT, labels)  # type: ignore[no-any-return]

    def _durations(self, writer: Writer, *labels: str) -> Histogram:
        return self._handle(writer.histogram, catalog.PROCESS_DURATION, labels)  # type: ignore[no-any-return]

    def _retries(self, writer: Writer, *labels: str) -> Counter:
        return self._handle(writer.counter, catalog.QUEUE_RETRIES, labels)  # type: ignore[no-any-return]

    def _handle(self, make: Callable[..., Any], metric: catalog.Metric, labels: tuple[str, ...]) -> Any:
        key = (metric.name, *labels)
        handle = self._handles.get(key)
        if handle is None:
            handle = self._handles[key] = make(metric, *labels)
        return handle


class Run:
    """One run under way."""

    __slots__ = ("_runs", "ended", "queue", "span", "started", "system", "task")

    def __init__(self, runs: Runs, system: str, queue: str, task: str) -> None:
        self._runs = runs
        self.system, self.queue, self.task = system, queue, task
        self.span: jobs.JobSpan | None = None
        self.started = time.perf_counter()
        self.ended: float | None = None
        """When the job itself ended (seconds of ``perf_counter``), where that is known before ``end``."""

    def end(self, error: str = "", *, retried: bool = False) -> None:
        """Note that it ended: with the name of an error's type, empty for success, and whether it comes again."""
        self._runs.end(self, error, retried, (self.ended or time.perf_counter()) - self.started)


def error_name(error: BaseException | None) -> str:
    """Return the error type of an outcome: empty without an error."""
    return "" if error is None else (type(error).__name__ or OTHER)
