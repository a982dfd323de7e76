"""The runtime probe: memory and its limit, CPU, descriptors, garbage collection, the accept queue, and what runs."""

from __future__ import annotations

import gc
import os
import platform
import time
from importlib import metadata
from typing import Any, ClassVar

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.own_io import own_io
from fastapi_headroom.probes import procfs
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.settings import Settings
from fastapi_headroom.store.writer import Counter, Gauge, Histogram, Writer

MOST_DESCRIPTORS = 4096
"""With more descriptors open, looking through them for listening sockets costs too much: no accept backlog."""
LISTENERS_EVERY = 30.0
"""Seconds between two looks for listening sockets of this process."""
LIMIT_EVERY = 15.0
"""Seconds between two looks at the memory limit: a container may be resized while it runs."""


class RuntimeProbe:
    """Measures the process. What the system does not tell has no series."""

    name: ClassVar[str] = "runtime"
    metrics: ClassVar[tuple[Metric, ...]] = (
        catalog.PROCESS_MEMORY,
        catalog.PROCESS_MEMORY_LIMIT,
        catalog.PROCESS_CPU,
        catalog.PROCESS_FDS,
        catalog.PROCESS_MAX_FDS,
        catalog.PROCESS_START,
        catalog.GC_PAUSE,
        catalog.GC_COLLECTIONS,
        catalog.ACCEPT_BACKLOG,
        catalog.APP_INFO,
    )

    def __init__(self, settings: Settings) -> None:
        self.guard = Guard(self.name)
        self._settings = settings
        self._writer: Writer | None = None
        self._pause: Histogram | None = None
        self._collection_began = 0.0
        # One bound method for good: `gc.callbacks.remove` must find what was appended.
        self._callback = self._on_collection
        self._cpu_counter: Counter | None = None
        self._cpu_pid = 0
        self._cpu_counted = 0.0
        self._generations: list[tuple[Counter, int]] = []
        self._listeners: list[int] = []
        self._ports: set[int] = set()
        self._listeners_due = self._limit_due = 0.0

    def bind(self, writer: Writer) -> None:
        """Resolve the handles, attach to the garbage collector and take the first samples."""
        self._writer = writer
        self._pause = writer.histogram(catalog.GC_PAUSE, writer.worker)
        if self._callback not in gc.callbacks:
            gc.callbacks.append(self._callback)
        self._cpu_counter = writer.counter(catalog.PROCESS_CPU, writer.worker)
        if self._cpu_pid != os.getpid():  # CPU time begins at 0 in a forked child; what one bind counted, the next has
            self._cpu_pid, self._cpu_counted = os.getpid(), 0.0
        self._generations = [
            (writer.counter(catalog.GC_COLLECTIONS, str(generation)), stats["collections"])
            for generation, stats in enumerate(gc.get_stats())
        ]
        self._listeners_due = self._limit_due = 0.0
        with own_io():
            self._set(catalog.PROCESS_START, procfs.start_time())
            self._set(catalog.PROCESS_MAX_FDS, _descriptor_limit())
            self._describe(writer).set(1.0)
            self.sample()

    def sample(self) -> None:
        """Write the gauges and bring the counters of the system up to date."""
        writer, cpu = self._writer, self._cpu_counter
        if writer is None or cpu is None:
            return
        now = time.monotonic()
        used = time.process_time()
        cpu.inc(max(0.0, used - self._cpu_counted))
        self._cpu_counted = used
        self._set(catalog.PROCESS_MEMORY, procfs.resident_memory())
        self._set(catalog.PROCESS_FDS, procfs.open_descriptors())
        if now >= self._limit_due:
            self._limit_due = now + LIMIT_EVERY
            self._set(catalog.PROCESS_MEMORY_LIMIT, procfs.memory_limit())
        stats = gc.get_stats()
        for generation, (counter, counted) in enumerate(self._generations):
            collections = stats[generation]["collections"]
            counter.inc(max(0, collections - counted))
            self._generations[generation] = (counter, collections)
        self._sample_backlog(writer, now)

    def close(self) -> None:
        """Detach from the garbage collector."""
        if self._callback in gc.callbacks:
            gc.callbacks.remove(self._callback)
        self._writer = self._pause = self._cpu_counter = None

    def _on_collection(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._collection_began = time.perf_counter()
        elif self._pause is not None and self._collection_began:
            try:
                self._pause.observe(time.perf_counter() - self._collection_began)
            except Exception as error:
                self.guard.failed(error)

    def _sample_backlog(self, writer: Writer, now: float) -> None:
        if now >= self._listeners_due:
            self._listeners_due = now + LISTENERS_EVERY
            sockets = procfs.socket_descriptors(MOST_DESCRIPTORS)
            self._listeners = [socket for socket in sockets if procfs.accept_backlog(socket) is not None]
        backlog = dict.fromkeys(self._ports, 0)  # nobody waits at a port that has been closed
        for listener in self._listeners:
            found = procfs.accept_backlog(listener)
            if found is not None:
                port, waiting = found
                backlog[port] = backlog.get(port, 0) + waiting
        self._ports = set(backlog)
        for port, waiting in backlog.items():
            writer.gauge(catalog.ACCEPT_BACKLOG, str(port)).set(waiting)

    def _set(self, metric: Metric, value: float | None) -> None:
        if value is not None and self._writer is not None:
            self._writer.gauge(metric, self._writer.worker).set(value)

    def _describe(self, writer: Writer) -> Gauge:
        return writer.gauge(
            catalog.APP_INFO,
            self._settings.service_name,
            self._settings.service_version,
            platform.python_version(),
            _version("fastapi"),
            _version("fastapi-headroom"),
        )


def _descriptor_limit() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else float(limit)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"
