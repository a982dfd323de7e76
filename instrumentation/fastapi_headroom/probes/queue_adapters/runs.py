"""Runs of jobs in a worker, as the adapters measure them: wait, run time, outcome, retries."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi_headroom import catalog
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.names import OTHER, BoundedNames
from fastapi_headroom.store.writer import Counter, Histogram, Writer


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

    def begin(self, system: str, queue: str, task: str, ready: float | None = None) -> Run | None:
        """Note the start of a run of a job that was ready at ``ready`` (seconds since 1970; None: it does not tell).

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
            return Run(self, system, queue, task)
        except Exception as error:
            self.guard.failed(error)
            return None

    def end(self, run: Run, error: str, retried: bool, seconds: float) -> None:
        """Note the end of a run; ``Run.end`` calls it."""
        if (writer := self.writer) is None:
            return
        try:
            name = self._errors(error) if error else ""
            self._durations(writer, run.system, run.queue, run.task, name).observe(seconds)
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

    __slots__ = ("_runs", "ended", "queue", "started", "system", "task")

    def __init__(self, runs: Runs, system: str, queue: str, task: str) -> None:
        self._runs = runs
        self.system, self.queue, self.task = system, queue, task
        self.started = time.perf_counter()
        self.ended: float | None = None
        """When the job itself ended (seconds of ``perf_counter``), where that is known before ``end``."""

    def end(self, error: str = "", *, retried: bool = False) -> None:
        """Note that it ended: with the name of an error's type, empty for success, and whether it comes again."""
        self._runs.end(self, error, retried, (self.ended or time.perf_counter()) - self.started)


def error_name(error: BaseException | None) -> str:
    """Return the error type of an outcome: empty without an error."""
    return "" if error is None else (type(error).__name__ or OTHER)
