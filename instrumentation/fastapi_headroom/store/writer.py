"""The writing side of the store: makes series and hands out the handles that probes write through.

Only making a series takes a lock; writing to one is what its handle does (see ``handles``). Nothing here
raises because of a disk, a directory or a lock: the writer then goes on in anonymous memory, says so once
in the log, and ``headroom_store_degraded`` turns 1 where it can still be seen.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import handles, layout, memory
from fastapi_headroom.store.handles import MOVES, Counter, Gauge, Handle, Histogram, RecentGauge, gil_enabled
from fastapi_headroom.store.region import CAPACITY, FullError, Region
from fastapi_headroom.store.slot_files import SlotFiles

__all__ = [
    "MOVES",
    "OVERFLOW",
    "Counter",
    "Gauge",
    "Histogram",
    "Samples",
    "Writer",
    "gil_enabled",
    "redirect",
    "redirected",
    "watch_redirect",
]

log = logging.getLogger("fastapi_headroom")
OVERFLOW = "_overflow"
"""The value of every label of a family's series for what came after the cap."""
_BYTES_PER_SERIES = 512
_COUNTER, _GAUGE, _HISTOGRAM = handles.classes(gil_enabled())
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Writer:
    """One worker's series. ``worker`` is the slot number as text, for ``worker`` labels."""

    def __init__(self, directory: Path | None, *, group_readable: bool, max_series: int) -> None:
        self._max_series = max_series
        self._capacity = max(CAPACITY, -(-max_series * _BYTES_PER_SERIES // CAPACITY) * CAPACITY)
        self._lock = threading.RLock()
        self._handles: dict[tuple[Metric, tuple[str, ...]], Handle] = {}
        self._overflow_logged = False
        self._files = SlotFiles(directory, group_readable=group_readable, capacity=self._capacity)
        self.worker = "0"
        _writers.add(self)

    @classmethod
    def open(cls, directory: Path, *, group_readable: bool = False, max_series: int = 20_000) -> Writer:
        """Claim the lowest free slot of a directory and go on from its counters.

        When that cannot be, log why and what to do, and count in memory until ``tend`` finds that it can.
        """
        if _redirected is not None:
            return _redirected
        writer = cls(directory, group_readable=group_readable, max_series=max_series)
        writer._files.open()
        slot = writer._files.slot
        # Without a slot the label must not be that of another worker.
        writer.worker = str(slot.number) if slot is not None else f"memory-{os.getpid()}"
        writer._make_own_series(restarted=slot is not None and slot.owned_before)
        return writer

    @classmethod
    def in_memory(cls, *, max_series: int = 20_000) -> Writer:
        """Make a writer without files, for tests and notebooks. Its worker is "0"."""
        writer = cls(None, group_readable=False, max_series=max_series)
        writer._make_own_series(restarted=False)
        return writer

    @property
    def degraded(self) -> bool:
        """Whether some of what is counted is in memory only."""
        return self._files.degraded

    def counter(self, metric: Metric, *values: str) -> Counter:
        """Return the handle of a counter; its series exists from now on. ``values`` are in the order of the labels."""
        handle = self._handles.get((metric, values)) or self._make(metric, values, "counter")
        assert isinstance(handle, Counter)
        return handle

    def gauge(self, metric: Metric, *values: str) -> Gauge:
        """Return the handle of a gauge; its series exists from now on."""
        handle = self._handles.get((metric, values)) or self._make(metric, values, "gauge")
        assert isinstance(handle, Gauge)
        return handle

    def histogram(self, metric: Metric, *values: str) -> Histogram:
        """Return the handle of a histogram; its series exist from now on."""
        handle = self._handles.get((metric, values)) or self._make(metric, values, "histogram")
        assert isinstance(handle, Histogram)
        return handle

    def summary(self, metric: Metric, *values: str) -> Histogram:
        """Return the handle of a summary, a histogram with one bucket that is not shown."""
        handle = self._handles.get((metric, values)) or self._make(metric, values, "summary")
        assert isinstance(handle, Histogram)
        return handle

    def exemplar(self, histogram: Histogram, value: float, trace_id: int, span_id: int) -> None:
        """Keep a trace as the example of the bucket that an observed value fell into. Nothing without files."""
        # Whoever moves the files closes the ring as well, under this lock; an exemplar is not worth a wait for it.
        if not self._lock.acquire(blocking=False):
            return
        try:
            region = self._files.regions.get("histogram")
            if region is None or not region.has_file or histogram.view is not region.view:
                return
            ring = self._files.exemplar_ring()
            if ring is not None:
                ring.write(histogram.cells[bisect_left(histogram.bounds, value)], value, trace_id, span_id)
        finally:
            self._lock.release()

    def samples(self) -> Samples:
        """Return what this worker wrote, as it would be scraped: (sample name, label pairs) to value."""
        samples: Samples = {}
        for stem, region in self._files.all():
            kind = "gauge" if stem.startswith("gauge") else "histogram" if stem == "histogram" else "counter"
            samples.update(layout.expose(region.entries(), kind))
        return samples

    def value(self, name: str, /, **labels: str) -> float:
        """Return the value of one sample. Raises KeyError when there is none."""
        return self.samples()[name, tuple(sorted(labels.items()))]

    def tend(self) -> None:
        """Move what waits in memory to files as soon as that can be, and settle marks (see ``marks``).

        For a thread that may wait, once a second.
        """
        if self._files.look_after():
            with memory.moving(), self._lock:
                self._files.tend()
        with self._lock:
            self._files.settle()

    def close(self) -> None:
        """Release the slot; handles go on in anonymous memory. Idempotent."""
        with self._lock:
            self._files.close()

    # ------------------------------------------------------------------ making series
    def _make(self, metric: Metric, values: tuple[str, ...], kind: str) -> Handle:
        if metric.kind != kind:
            raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")
        if len(values) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, but the values given are {values}")
        with self._lock:
            handle = self._handles.get((metric, values))
            if handle is not None:
                return handle
            folded = tuple(OVERFLOW for _ in values)
            handle = self._place(metric, values, capped=values != folded and metric.stem != "self")
            if handle is None:
                handle = self._fold(metric, folded)
                # Folded label sets are remembered up to a bound: a hostile client makes new ones without end.
                if len(self._handles) > 2 * self._max_series:
                    return handle
            self._handles[metric, values] = handle
            return handle

    def _place(self, metric: Metric, values: tuple[str, ...], *, capped: bool) -> Handle | None:
        """Make a handle in the metric's file, or in memory when the disk is full. None: the cap is reached."""
        stem = layout.stem_of(metric)
        keys = layout.keys_of(metric, [layout.clean(value) for value in values])
        capped = capped and bool(values)
        files = self._files
        for region in (files.region(stem), files.spares.get(stem)):
            if region is not None and region.has(keys[0]):
                return self._handle(metric, region, region.place(keys))
        if capped and self._series() + len(keys) > self._max_series:
            return None
        try:
            region = files.region(stem)
            return self._handle(metric, region, region.place(keys))
        except FullError as error:
            if capped:
                return None
            files.degrade(error)
        except OSError as error:
            files.degrade(error)
        spare = files.spare(stem)
        return self._handle(metric, spare, spare.place(keys))

    def _fold(self, metric: Metric, folded: tuple[str, ...]) -> Handle:
        if not self._overflow_logged:
            self._overflow_logged = True
            log.warning(
                "fastapi-headroom: this worker has %d series, the most that max_series=%d allows; further label sets "
                "count as %s (first: %s). Raise HEADROOM_MAX_SERIES, or look for a label without bounds.",
                self._series(),
                self._max_series,
                OVERFLOW,
                metric.name,
            )
        self.counter(catalog.LABEL_OVERFLOW).inc()
        return self._make(metric, folded, metric.kind)

    def _handle(self, metric: Metric, region: Region, indexes: list[int]) -> Handle:
        handle: Handle
        if metric.kind in ("histogram", "summary"):
            handle = _HISTOGRAM(
                region.view, indexes[0], tuple(indexes[1:]), metric.buckets, region.marks.index(indexes)
            )
        elif metric.kind == "counter":
            handle = _COUNTER(region.view, indexes[0])
        elif metric.mode.endswith("mostrecent"):
            handle = RecentGauge(region.view, indexes[0])
        else:
            handle = _GAUGE(region.view, indexes[0])
        region.handles.append(handle)
        return handle

    def _series(self) -> int:
        return sum(region.samples for _, region in self._files.all())

    def _make_own_series(self, *, restarted: bool) -> None:
        self.counter(catalog.LABEL_OVERFLOW)
        gauge = self._files.degraded_gauge = self.gauge(catalog.STORE_DEGRADED)
        gauge.set(float(self.degraded))
        restarts = self.counter(catalog.WORKER_RESTARTS)
        if restarted:
            restarts.inc()

    def _after_fork_in_child(self) -> None:
        """Keep nothing of the parent's: neither its lock, which would outlive it, nor its files."""
        self._lock = threading.RLock()  # another thread of the parent may have held it
        if self._files.directory is not None:
            if self._files.slot is not None:
                self._files.slot.release()
            self._files.leave(copy=False)


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()
_redirected: Writer | None = None
_watchers: list[Callable[[], None]] = []


def redirect(writer: Writer | None) -> None:
    """Let every ``Writer.open`` return this writer (None: a real one again), and tell those who watch.

    The door for ``testing.capture_metrics``: whoever has bound probes to a writer registers with
    ``watch_redirect`` and binds them anew to what ``Writer.open`` then returns.
    """
    global _redirected
    _redirected = writer
    for watcher in tuple(_watchers):
        watcher()


def redirected() -> Writer | None:
    """Return the writer that ``Writer.open`` returns for now, if there is one."""
    return _redirected


def watch_redirect(watcher: Callable[[], None]) -> Callable[[], None]:
    """Call ``watcher`` after each change of the redirection. Returns a function that ends this."""
    _watchers.append(watcher)

    def stop() -> None:
        if watcher in _watchers:
            _watchers.remove(watcher)

    return stop


def _after_fork_in_child() -> None:
    handles.renew_lock()
    memory.renew_lock()
    for writer in list(_writers):
        writer._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
