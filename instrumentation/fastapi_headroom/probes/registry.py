"""The app's own metrics: what it registers in prometheus_client's default registry, in the same scrape as ours.

In prometheus_client's multiprocess mode, with its directory ours, counters, gauges, histograms and summaries lie in
files that the exporter reads anyway. Whatever else is in ``prometheus_client.REGISTRY`` is looked at once per sample
interval, on a thread of its own, and written to the worker's slot: counts as what was added since the last look, so
that several workers add up and a restarted one goes on. ``process_*`` and ``python_*`` are left out, as is what has
the name of a metric of ours.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric, Mode
from fastapi_headroom.probes.base import Guard
from fastapi_headroom.probes.registry_series import DEFAULT_MODE, HandedOver, Labels, TooManyError, UserSeries, inherit
from fastapi_headroom.settings import Settings, multiprocess_directory
from fastapi_headroom.store.writer import Counter, Writer, redirected

if TYPE_CHECKING:
    from prometheus_client import metrics_core

log = logging.getLogger("fastapi_headroom")

REST: Final = 50.0
"""A look that took CPU time is followed by at least so many times that without one: at most 2 % of a core."""
_OURS: Final = frozenset(metric.family for metric in catalog.ALL)
_FLUSH_SECONDS: Final = 0.5
PATIENCE: Final = 30.0
"""Seconds after which a collector that has not returned is named in the log."""


class RegistrySnapshot:
    """Writes what is in ``prometheus_client.REGISTRY``; without prometheus_client in the process it does nothing.

    While metrics are captured for a test it rests: the registry itself tells a test what is in it.
    """

    name: ClassVar[str] = "registry"
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        self.guard = Guard(self.name)
        self._settings = settings
        self._series: UserSeries | None = None
        self._forget_thread()
        self._complained: set[object] = set()
        _snapshots.add(self)

    def _forget_thread(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._wanted = threading.Event()
        self._looking = threading.Lock()
        self._rest_until = 0.0
        self._at: tuple[Any, float] | None = None  # the collector that is asked, and since when

    def bind(self, writer: Writer) -> None:
        """Write to this writer from now on."""
        if self._pid != os.getpid():
            self._forget_thread()  # the parent's thread is not here, and its lock may have been held
        elif self._series is not None:
            self.flush()
        self._series = None
        if self._settings.prometheus_registry and redirected() is None:
            self._errors: Counter = writer.counter(catalog.PROBE_ERRORS, self.name)
            self._overflow: Counter = writer.counter(catalog.LABEL_OVERFLOW)
            self._series = UserSeries(writer, self._settings.max_series // 2)

    def sample(self) -> None:
        """Have the thread look at the registry, unless it still does or has to rest. Waits for nothing."""
        at = self._at
        if at is not None and time.monotonic() - at[1] > PATIENCE:
            self._complain(
                ("hangs", id(at[0])), "the app's collector %s has not returned for %d s; the app's own metrics stand "
                "still until it does", type(at[0]).__qualname__, PATIENCE
            )  # fmt: skip
        if self._series is None or "prometheus_client" not in sys.modules or time.monotonic() < self._rest_until:
            return
        if self._thread is None:
            # Collectors are the user's code and may wait for a network: not on the thread of the other probes.
            self._thread = threading.Thread(
                target=self._run, args=(self._wanted,), name="headroom-registry", daemon=True
            )
            self._thread.start()
        self._wanted.set()

    def flush(self) -> None:
        """Look once more before the process ends, at metrics only: other collectors might keep it waiting."""
        if "prometheus_client" in sys.modules and self._looking.acquire(timeout=_FLUSH_SECONDS):
            try:
                self._look(foreign=False)
            except Exception as error:
                self.guard.failed(error)
            finally:
                self._looking.release()

    def hand_over(self) -> None:
        """After a fork, in a parent that writes no metrics itself: leave what is counted until now to this child."""
        if self._series is None and self._settings.prometheus_registry and "prometheus_client" in sys.modules:
            handed_over = HandedOver()
            for collector in _collectors(self._settings):
                if _is_metric(collector):
                    self._write(handed_over, collector)

    def close(self) -> None:
        """Flush, and end the thread."""
        if self._series is not None:
            self.flush()
        self._series = None
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wanted.set()

    def _run(self, wanted: threading.Event) -> None:
        while wanted.wait() and self._thread is threading.current_thread():
            began = time.thread_time()
            try:
                with self._looking:
                    self._look(foreign=True)
            except Exception as error:
                self.guard.failed(error)
            self._rest_until = time.monotonic() + REST * (time.thread_time() - began)
            wanted.clear()  # not before: samples during the look ask for nothing more
            if self._thread is not threading.current_thread():
                return

    def _look(self, *, foreign: bool) -> None:
        series = self._series
        if series is None:
            return
        collectors = _collectors(self._settings)
        series.forget(map(id, collectors))
        for collector in collectors:
            if foreign or _is_metric(collector):
                self._at = (collector, time.monotonic())
                self._write(series, collector)
                self._at = None
                time.sleep(0)  # let the event loop have the interpreter before the next one

    def _write(self, series: UserSeries, collector: Any) -> None:
        mode: Mode = getattr(collector, "_multiprocess_mode", DEFAULT_MODE)
        if mode == "all":  # prometheus_client's default; it would add a label that a single process' gauge has not
            mode = DEFAULT_MODE
        try:
            series.begin(id(collector))
            for family in collector.collect():
                if not (family.name in _OURS or family.name.startswith(("process_", "python_"))):
                    _WRITERS.get(family.type, _write_gauges)(series, id(collector), family, mode)
            series.end(id(collector))
        except TooManyError:
            self._overflow.inc()
            self._complain(
                TooManyError, "the app's own metrics have more than %d samples; the rest of them is not exported "
                "(HEADROOM_MAX_SERIES allows twice as many in all)", self._settings.max_series // 2
            )  # fmt: skip
        except Exception as error:
            self._errors.inc()
            self._complain(
                id(collector), "the app's collector %s failed (%s: %s) and is missing from scrapes until it works",
                type(collector).__qualname__, type(error).__name__, error,
            )  # fmt: skip

    def _complain(self, about: object, message: str, *arguments: object) -> None:
        if about not in self._complained and len(self._complained) < 100:
            self._complained.add(about)
            log.warning("fastapi-headroom: " + message, *arguments)


def _collectors(settings: Settings) -> list[Any]:
    """Return what the app registered, less what the exporter has from elsewhere."""
    from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, REGISTRY, values

    # Its public collect() ends at the first collector that raises.
    known = getattr(REGISTRY, "_collector_to_names", None)
    collectors: list[Any] = [REGISTRY] if known is None else list(known.copy())
    directory = multiprocess_directory()
    in_our_files = (
        directory is not None
        and bool(getattr(values.ValueClass, "_multiprocess", False))
        and directory.resolve() == settings.store_directory.resolve()
    )
    left_out = {id(GC_COLLECTOR), id(PLATFORM_COLLECTOR), id(PROCESS_COLLECTOR)}
    return [
        collector
        for collector in collectors
        if id(collector) not in left_out
        # this one reads files, of which ours are some
        and type(collector).__module__ != "prometheus_client.multiprocess"
        and not (in_our_files and _is_in_files(collector))
    ]


def _is_metric(collector: Any) -> bool:
    from prometheus_client.metrics import MetricWrapperBase

    return isinstance(collector, MetricWrapperBase)


def _is_in_files(collector: Any) -> bool:
    from prometheus_client import Counter, Gauge, Histogram, Summary

    return isinstance(collector, Counter | Gauge | Histogram | Summary)


_snapshots: weakref.WeakSet[RegistrySnapshot] = weakref.WeakSet()


def _after_fork_in_parent() -> None:
    for snapshot in list(_snapshots):
        try:
            snapshot.hand_over()
        except Exception as error:
            snapshot.guard.failed(error)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=inherit)


# ------------------------------------------------------------------ one family of samples
Write = Callable[[UserSeries, int, "metrics_core.Metric", Mode], None]


def _write_counters(series: UserSeries, owner: int, family: metrics_core.Metric, mode: Mode) -> None:
    for sample in family.samples:
        if sample.name == f"{family.name}_total":
            series.counter(family.name, family.documentation, _labels(sample.labels.items()), sample.value)


def _write_histograms(series: UserSeries, owner: int, family: metrics_core.Metric, mode: Mode) -> None:
    buckets: dict[Labels, dict[float, float]] = {}
    sums: dict[Labels, float] = {}
    for name, labels, value, *_ in family.samples:
        if name.endswith("_bucket"):
            without = _labels((name, text) for name, text in labels.items() if name != "le")
            buckets.setdefault(without, {})[float(labels["le"])] = value
        elif name.endswith("_sum"):
            sums[_labels(labels.items())] = value
    for key, cumulative in buckets.items():
        series.histogram(family.name, family.documentation, key, cumulative, sums.get(key, 0.0))


def _write_summaries(series: UserSeries, owner: int, family: metrics_core.Metric, mode: Mode) -> None:
    parts: dict[Labels, dict[str, float]] = {}
    for name, labels, value, *_ in family.samples:
        if name.endswith(("_sum", "_count")):
            parts.setdefault(_labels(labels.items()), {})[name] = value
    for key, found in parts.items():
        count, total = found.get(f"{family.name}_count", 0.0), found.get(f"{family.name}_sum", 0.0)
        series.summary(family.name, family.documentation, key, count, total)


def _write_gauges(series: UserSeries, owner: int, family: metrics_core.Metric, mode: Mode) -> None:
    for sample in family.samples:
        if not sample.name.endswith("_created"):
            labels = _labels(sample.labels.items())
            series.gauge(owner, sample.name, family.documentation, labels, sample.value, mode)


_WRITERS: Final[dict[str, Write]] = {
    "counter": _write_counters,
    "histogram": _write_histograms,
    "summary": _write_summaries,
}
"""By type; everything else (info, state sets, unknown) is a gauge, as in Prometheus' text form."""


def _labels(pairs: Iterable[tuple[str, Any]]) -> Labels:
    return cast(Labels, tuple(sorted((name, str(value)) for name, value in pairs)))
