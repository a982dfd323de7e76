"""The snapshot of prometheus_client's registry: what is written of it, and what it may cost."""

from __future__ import annotations

import itertools
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from fastapi_headroom import settings
from fastapi_headroom.probes import registry
from fastapi_headroom.probes.registry import RegistrySnapshot
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from fastapi_headroom.testing import capture_metrics
from tests.support.measured import compute, eventually


class Custom:
    """A collector that yields what it is told."""

    def __init__(self, *families: Metric) -> None:
        self.families = list(families)
        self.before: Callable[[], Any] = lambda: None

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        self.before()
        yield from self.families


class Snapshot:
    """A probe over a store, looked at on demand."""

    def __init__(self, directory: Path, **arguments: Any) -> None:
        self.directory = directory
        self.writer = Writer.open(directory)
        self.probe = RegistrySnapshot(settings.load({}, directory=directory, **arguments))
        self.probe.bind(self.writer)

    def look(self) -> dict[str, float]:
        """Have the registry looked at and return the samples of the test's metrics as a scrape has them."""
        with self.probe._looking:
            self.probe._look(foreign=True)
        return self.scraped()

    def scraped(self) -> dict[str, float]:
        return {
            name + "".join(f",{key}={text}" for key, text in labels): value
            for (name, labels), value in Reader(self.directory).read().values().items()
            if name.startswith("t_")
        }

    def close(self) -> None:
        self.probe.close()
        self.writer.close()


@pytest.fixture
def register() -> Iterator[Callable[[Any], Any]]:
    """Register collectors in the default registry for the length of a test; metrics are there already."""
    before = set(REGISTRY._collector_to_names)

    def add(collector: Any) -> Any:
        if collector not in REGISTRY._collector_to_names:
            REGISTRY.register(collector)
        return collector

    yield add
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[Snapshot]:
    """A snapshot that writes to slot 0 of a store."""
    made = Snapshot(tmp_path)
    yield made
    made.close()


def test_a_restarted_worker_goes_on_and_a_second_init_counts_nothing_twice(register: Any, tmp_path: Path) -> None:
    """The slot's counts stay when a process begins at 0, and what one process has reported it does not report again."""
    counter = register(Counter("t_restarts", "Text."))
    counter.inc(3)
    first = Snapshot(tmp_path)
    assert first.look() == {"t_restarts_total": 3.0}
    first.close()
    again = Snapshot(tmp_path)  # the same process: init, shutdown, init
    assert again.look() == {"t_restarts_total": 3.0}
    counter.inc()
    assert again.look() == {"t_restarts_total": 4.0}
    counter.reset()  # as in a new process
    counter.inc(2)
    assert again.look() == {"t_restarts_total": 6.0}
    again.close()


def test_a_forked_child_adds_only_its_own(register: Any, snapshot: Snapshot) -> None:
    """Counts that the parent reported before the fork are not the child's; gauges are."""
    counter, gauge = (
        register(Counter("t_forked", "Text.")),
        register(Gauge("t_level", "Text.", multiprocess_mode="sum")),
    )
    counter.inc(5)
    gauge.set(2)
    snapshot.look()
    child = os.fork()
    if child == 0:
        try:
            counter.inc(1)
            mine = Writer.open(snapshot.directory)
            snapshot.probe.bind(mine)
            snapshot.look()
            os._exit(int(mine.worker))
        except BaseException:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert snapshot.scraped() == {"t_forked_total": 6.0, "t_level": 4.0}


def test_what_a_preloading_master_counted_is_reported_once(register: Any, tmp_path: Path) -> None:
    """Its workers inherit what was counted before they were forked, those too that replace others: one of them reports
    it, and each its own."""
    counter, histogram = (
        register(Counter("t_boots", "Text.", ["kind"])),
        register(Histogram("t_loading", "Text.", buckets=(1.0,))),
    )
    master = RegistrySnapshot(settings.load({}, directory=tmp_path))
    for _ in range(3):
        counter.labels("cold").inc(4)
        histogram.observe(0.5)
        child = os.fork()
        if child == 0:
            try:
                counter.labels("cold").inc(0.5)
                writer = Writer.open(tmp_path)
                master.bind(writer)
                master.flush()
                master.close()
                writer.close()
                os._exit(0)
            except BaseException:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    values = Reader(tmp_path).read().values()
    assert values["t_boots_total", (("kind", "cold"),)] == 3 * 4 + 3 * 0.5
    assert (values["t_loading_count", ()], values["t_loading_sum", ()]) == (3, 1.5)
    master.close()


def test_every_type_of_a_custom_collector_is_written(register: Any, snapshot: Snapshot) -> None:
    """Counters, histograms and unknown types of custom collectors arrive; names of ours and process_* do not."""
    histogram = HistogramMetricFamily("t_h", "Text.", labels=["le_", "z"])
    histogram.add_metric(["a", "b"], [("0.5", 1), ("2", 3), ("+Inf", 4)], sum_value=9.5)
    counter = CounterMetricFamily("t_c", "Text.", labels=["k"], created=1.0)
    counter.add_metric(["v"], 4)
    unknown = Metric("t_u", "Text.", "unknown")
    unknown.add_sample("t_u", {}, -1.0)
    ours = GaugeMetricFamily("headroom_remaining_ratio", "Text.", value=42)
    process = GaugeMetricFamily("process_cpu_seconds", "Text.", value=42)
    register(Custom(histogram, counter, unknown, ours, process))
    assert snapshot.look() == {
        "t_h_bucket,le=0.5,le_=a,z=b": 1.0,
        "t_h_bucket,le=2.0,le_=a,z=b": 3.0,
        "t_h_bucket,le=+Inf,le_=a,z=b": 4.0,
        "t_h_sum,le_=a,z=b": 9.5,
        "t_h_count,le_=a,z=b": 4.0,
        "t_c_total,k=v": 4.0,
        "t_u": -1.0,
    }
    assert 42 not in Reader(snapshot.directory).read().values().values()


def test_a_gauge_that_is_gone_vanishes(register: Any, snapshot: Snapshot) -> None:
    """A label set that a collector has no more, and a collector that was unregistered, leave the scrape."""
    gauge = register(Gauge("t_gauge", "Text.", ["k"]))
    custom = register(Custom(GaugeMetricFamily("t_custom", "Text.", value=1)))
    gauge.labels("a").set(1)
    gauge.labels("b").set(2)
    assert snapshot.look() == {"t_gauge,k=a": 1.0, "t_gauge,k=b": 2.0, "t_custom": 1.0}
    gauge.remove("a")
    REGISTRY.unregister(custom)
    assert snapshot.look() == {"t_gauge,k=b": 2.0}
    gauge.labels("a").set(1)
    assert snapshot.look() == {"t_gauge,k=a": 1.0, "t_gauge,k=b": 2.0}


@pytest.mark.parametrize("mode", ["all", "mostrecent", "livemostrecent"])
def test_a_gauge_that_one_worker_never_set_shows_what_another_set(register: Any, tmp_path: Path, mode: Any) -> None:
    """A 0 that is found at a worker's first look hides nothing, however late that is; a 0 that was set does."""
    gauge = register(Gauge("t_level", "Text.", multiprocess_mode=mode))
    first, second = Snapshot(tmp_path), Snapshot(tmp_path)
    assert first.look() == {"t_level": 0.0}
    gauge.set(3)
    first.look()
    gauge.set(0)  # as it is in the other worker's process
    assert second.look() == {"t_level": 3.0}
    assert first.look() == {"t_level": 0.0}
    gauge.set(7)
    assert second.look() == {"t_level": 7.0}
    first.close()
    second.close()


def test_it_is_bounded(register: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The app's own metrics take half of the series at most; it is said once, and our metrics have their room."""
    made = Snapshot(tmp_path, max_series=1000)
    counter = register(Counter("t_many", "Text.", ["k"]))
    for number in range(2000):
        counter.labels(str(number)).inc()
    with caplog.at_level(logging.WARNING):
        made.look()
        assert len(made.look()) == 500
    assert len([r for r in caplog.records if "more than 500 samples" in r.getMessage()]) == 1
    made.close()


def least_of_three(act: Callable[[], object]) -> float:
    """Return the seconds that it took at least: a busy machine may put any single one off."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        act()
        took.append(time.monotonic() - began)
    return min(took)


def hanging(register: Any, name: str) -> tuple[threading.Event, threading.Event]:
    """Register a collector that waits; return what tells that it was asked, and what lets it answer."""
    asked, answer = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        answer.wait(60)

    register(Custom(GaugeMetricFamily(name, "Text.", value=1))).before = wait
    return asked, answer


def test_a_collector_that_waits_holds_up_nobody(register: Any, snapshot: Snapshot) -> None:
    """sample(), flush() and close() return at once while a collector waits for a network that does not answer."""
    counter = register(Counter("t_blocked", "Text."))
    asked, answer = hanging(register, "t_late")
    counter.inc()
    snapshot.probe.sample()
    assert asked.wait(30)
    assert least_of_three(snapshot.probe.sample) < 1.0
    assert snapshot.scraped() == {"t_blocked_total": 1.0}
    assert least_of_three(snapshot.probe.flush) < 1.0
    assert not answer.is_set()
    answer.set()
    eventually(lambda: "t_late" in snapshot.scraped())


def test_it_rests_in_proportion_to_what_a_look_costs(register: Any, snapshot: Snapshot) -> None:
    """After a look that took CPU time the next ones are left out until it was 2 % of the time at most."""
    looks: list[float] = []
    slow = register(Custom(GaugeMetricFamily("t_slow", "Text.", value=1)))

    def burn() -> None:
        looks.append(time.monotonic())
        compute(0.02)

    slow.before = burn
    deadline = time.monotonic() + 5
    while len(looks) < 2 and time.monotonic() < deadline:
        snapshot.probe.sample()
        time.sleep(0.01)
    assert looks[1] - looks[0] >= 0.02 * 50


def test_captured_metrics_are_ours_alone(register: Any, snapshot: Snapshot) -> None:
    """Inside capture_metrics() the registry is left to the test; what was counted there is in the store afterwards."""
    counter = register(Counter("t_captured", "Text."))
    with capture_metrics() as metrics:
        snapshot.probe.bind(metrics.writer)
        counter.inc()
        assert snapshot.look() == {"t_captured_total": 0.0}
        assert "t_captured_total" not in metrics
    snapshot.probe.bind(snapshot.writer)
    assert snapshot.look() == {"t_captured_total": 1.0}


def test_a_registry_of_a_thousand_samples_takes_milliseconds(register: Any, snapshot: Snapshot) -> None:
    """A look at 1,000 samples that are known takes less than 20 ms of CPU, which a second's interval makes 2 %."""
    histogram = register(Histogram("t_h60", "Text.", ["route"]))
    for number in range(60):
        histogram.labels(f"/{number}").observe(0.1)
    snapshot.look()
    took = []
    for _ in range(5):
        began = time.thread_time()
        with snapshot.probe._looking:
            snapshot.probe._look(foreign=True)
        took.append(time.thread_time() - began)
    assert min(took) < 0.02, took
    print(f"{min(took) * 1000:.2f} ms")


_numbers = itertools.count()
_amounts = st.floats(min_value=0, max_value=1e12, allow_nan=False)
_texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@settings_of_hypothesis(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Counter, Gauge, Histogram, Summary]),
    looks=st.lists(st.lists(st.tuples(_texts, _texts, _amounts), max_size=6), min_size=1, max_size=4),
)
def test_a_scrape_says_what_prometheus_client_says(kind: type[Any], looks: list[list[tuple[str, str, float]]]) -> None:
    """For one process the scrape equals the registry's own samples, whatever is written between the looks."""
    name = f"t_{next(_numbers)}"
    metric = kind(name, 'A "help" text.\n', ["z", "a"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Snapshot(Path(folder))
            for writes in looks:
                for first, second, amount in writes:
                    child = metric.labels(first, second)
                    write = child.inc if kind is Counter else child.set if kind is Gauge else child.observe
                    write(amount)
                made.look()
            expected = {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for family in metric.collect()
                for sample in family.samples
                if not sample.name.endswith("_created")
            }
            found = {
                key: value for key, value in Reader(Path(folder)).read().values().items() if key[0].startswith(name)
            }
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert math.isclose(found[key], value, rel_tol=1e-9, abs_tol=1e-3), key  # sums of differences
            made.close()
    finally:
        REGISTRY.unregister(metric)


def test_a_collector_that_never_returns_is_named(
    register: Any, snapshot: Snapshot, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics of the app's own that stand still because a collector hangs are no riddle: one line names it."""
    asked, answer = hanging(register, "t_hung")
    snapshot.probe.sample()
    assert asked.wait(30)
    snapshot.probe.sample()
    assert caplog.text == ""
    monkeypatch.setattr(registry, "PATIENCE", 0.0)
    for _ in range(3):
        snapshot.probe.sample()
    assert caplog.text.count("collector Custom has not returned") == 1
    answer.set()
    eventually(lambda: "t_hung" in snapshot.scraped())
