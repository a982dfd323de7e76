"""The reader: the numbers of prometheus_client's own collector, from whatever lies in the directory."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.multiprocess import MultiProcessCollector

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import layout
from fastapi_headroom.store.reader import Family, Reader, Snapshot
from fastapi_headroom.store.writer import Writer
from tests.store.workers import Worker
from tests.support.no_files import a_dangling_link, a_directory, a_pipe

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]
ERRORS = ("headroom_probe_errors_total", (("probe", "request"),))


def oracle(directory: Path) -> Values:
    """Return what prometheus_client's own collector makes of the directory."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in MultiProcessCollector(None, str(directory)).collect()
        for sample in family.samples
    }


METRICS = (
    Metric("jobs_total", "counter", "queue", ("kind",), 'Jobs; "quoted" \\ and\nmore.'),
    Metric("seconds_total", "counter", "queue", (), "Seconds."),
    Metric("wait_seconds", "histogram", "queue", ("kind",), "Waits.", buckets=(0.5, 2.0, 1e6, 1e7)),
    Metric("plain_seconds", "histogram", "queue", (), "Waits.", buckets=(1.0,)),
    Metric("sum_of", "gauge", "queue", ("kind",), "A sum.", mode="livesum"),
    Metric("max_of", "gauge", "queue", ("kind",), "A maximum.", mode="livemax"),
    Metric("min_of", "gauge", "queue", ("kind",), "A minimum.", mode="livemin"),
)
Write = tuple[int, Metric, str, float]
writes = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from(METRICS), st.sampled_from(["", "a", "é\n\"'\\", "b"]) | st.text(max_size=3),
        st.integers(0, 1 << 24).map(float),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(writes, st.booleans())
def test_reader_and_prometheus_client_agree_with_what_was_written(items: list[Write], warm: bool) -> None:
    """Whatever three workers write, both readers return it, also when ours has read the directory before."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    writers = [Writer.open(directory) for _ in range(3)]
    reader = Reader(directory)
    try:
        for number, item in enumerate(items):
            write(writers[item[0]], *item[1:])
            if warm and number % 5 == 0:
                reader.read()
        values = reader.read().values()
        assert values == oracle(directory)
        ours = {series: value for series, value in values.items() if not series[0].startswith("headroom_")}
        assert ours == expected(items)
    finally:
        reader.close()
        for writer in writers:
            writer.close()
        shutil.rmtree(directory)


def write(writer: Writer, metric: Metric, label: str, value: float) -> None:
    """Make one write of the kind that the metric is."""
    labels = (label,) if metric.labels else ()
    if metric.kind == "counter":
        writer.counter(metric, *labels).inc(value)
    elif metric.kind == "gauge":
        writer.gauge(metric, *labels).set(value)
    else:
        writer.histogram(metric, *labels).observe(value)


def expected(items: list[Write]) -> Values:
    """Return the right result by the plainest arithmetic."""
    result: Values = defaultdict(float)
    gauges: dict[tuple[Metric, tuple[tuple[str, str], ...]], dict[int, float]] = defaultdict(dict)
    for worker, metric, label, value in items:
        labels = (("kind", label),) if metric.labels else ()
        if metric.kind == "counter":
            result[metric.name, labels] += value
        elif metric.kind == "gauge":
            gauges[metric, labels][worker] = value
        else:
            result[f"{metric.name}_sum", labels] += value
            result[f"{metric.name}_count", labels] += 1
            for bound in (*metric.buckets, float("inf")):
                le = ("le", layout.bound_text(bound))
                result[f"{metric.name}_bucket", tuple(sorted((*labels, le)))] += value <= bound
    for (metric, labels), values in gauges.items():
        fold = {"livesum": sum, "livemax": max, "livemin": min}[metric.mode]
        result[metric.name, labels] = fold(values.values())
    return dict(result)


def test_metrics_made_with_prometheus_client_appear_beside_ours(tmp_path: Path) -> None:
    """What other processes wrote, gauges of all ten modes too, reads as prometheus_client's collector reads it."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    reader = Reader(tmp_path)
    for number in ("3", "2"):
        script = Path(__file__).with_name("peer_process.py")
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        subprocess.run([sys.executable, str(script), number], env=environment, check=True, timeout=30)
        values = reader.read().values()
        assert values == oracle(tmp_path)
    assert values["shop_orders_total", (("country", "fr"),)] == 5
    assert values["shop_gauge_min", (("kind", "x"),)] == 2
    assert values["shop_gauge_mostrecent", (("kind", "x"),)] == 2
    assert len([name for name, _ in values if name == "shop_gauge_all"]) == 2
    assert values[ERRORS] == 1
    writer.close()


def test_rows_stay_the_same_object_until_a_series_comes(tmp_path: Path) -> None:
    """What the exposition keeps on a family's rows lasts from read to read and goes with a new series."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    reader = Reader(tmp_path)

    def family(snapshot: Snapshot) -> object:
        return next(family for family in snapshot.families if family.name == "headroom_probe_errors").rows

    first = family(reader.read())
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    assert family(reader.read()) is first
    writer.counter(catalog.PROBE_ERRORS, "cache")
    assert family(reader.read()) is not first
    writer.close()


# ---------------------------------------------------------------------- damaged files
def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def no_json(path: Path) -> None:
    entry = layout.entry(b"no json")
    path.write_bytes(layout.used_header(8 + len(entry)) + bytes(4) + entry)


def lying_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write(layout.used_header((1 << 31) - 8))
        file.truncate(1 << 31)


@pytest.mark.parametrize("damage", [random_bytes, no_json, lying_header, a_pipe, a_directory, a_dangling_link])
def test_what_is_no_store_file_is_skipped_and_named(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is read, the bad file is named in the snapshot, and the log says it once."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    damage(tmp_path / "counter_77.db")
    (tmp_path / "notes.db").write_text("mine")
    reader = Reader(tmp_path)
    for _ in range(3):
        snapshot = reader.read()
        assert snapshot.unreadable == ["counter_77.db", "notes.db"]
        assert snapshot.values()[ERRORS] == 1
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if "counter_77.db" in text]) == 1
    writer.close()


def test_a_file_truncated_between_two_reads_is_skipped_and_comes_back(tmp_path: Path) -> None:
    """A truncated file costs its own numbers only, and once it is whole again it counts again."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "request").inc(4)
    other = Writer.open(tmp_path)
    other.counter(catalog.PROBE_ERRORS, "request").inc(1)
    other.close()
    reader = Reader(tmp_path)
    assert reader.read().values()[ERRORS] == 5
    path = tmp_path / "counter_slot1.db"
    whole = path.read_bytes()
    os.truncate(path, 100)
    snapshot = reader.read()
    assert snapshot.unreadable == ["counter_slot1.db"]
    assert snapshot.values()[ERRORS] == 4
    path.write_bytes(whole)
    assert reader.read().values()[ERRORS] == 5
    writer.close()


@pytest.mark.parametrize("descriptors", [1024, 1])
def test_a_replaced_file_is_parsed_anew(descriptors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name and size but other series is not read with the old one's keys, even on one inode."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (descriptors, descriptors))
    reader = Reader(tmp_path)
    path = tmp_path / "counter_5.db"
    for probe in ("aa", "bb", "cc"):
        raw = layout.entry(layout.keys_of(catalog.PROBE_ERRORS, [probe])[0], 1.0)
        path.unlink(missing_ok=True)
        path.write_bytes(layout.used_header(8 + len(raw)) + bytes(4) + raw)
        assert reader.read().values() == {("headroom_probe_errors_total", (("probe", probe),)): 1.0}


def test_files_that_come_and_go_leave_nothing_in_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors of files that are gone are closed and their series forgotten in time."""
    monkeypatch.setattr("fastapi_headroom.store.reader._FORGET_BEYOND", 50)
    reader = Reader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for number in range(300):
        raw = layout.entry(layout.keys_of(catalog.PROBE_ERRORS, [str(number)])[0], 1.0)
        path = tmp_path / f"counter_{number}.db"
        path.write_bytes(layout.used_header(8 + len(raw)) + bytes(4) + raw)
        assert reader.read().values() == {("headroom_probe_errors_total", (("probe", str(number)),)): 1.0}
        path.unlink()
    assert len(reader._index.series) < 60
    reader.read()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("limit", [2, 18, 1024])
def test_few_descriptors_are_enough(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few descriptors to keep open, or none, the reader is slower and as right, and keeps to half of them."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    writers = [Writer.open(tmp_path) for _ in range(6)]
    for writer in writers:
        writer.counter(catalog.PROBE_ERRORS, "request").inc()
    reader = Reader(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        assert reader.read().values() == oracle(tmp_path)
    locks, files = 6, 12
    kept = len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208
    assert kept == locks + min(files, max(0, limit // 2 - locks))
    for writer in writers:
        writer.close()


def test_a_directory_that_is_missing_is_empty(tmp_path: Path) -> None:
    """A sidecar may start before the app: no directory means no families, and then they come."""
    reader = Reader(tmp_path / "store")
    assert reader.read() == Snapshot()
    writer = Writer.open(tmp_path / "store")
    assert reader.read().alive == [0]
    writer.close()


# ---------------------------------------------------------------------- concurrency
def test_a_reader_never_sees_a_counter_fall_or_a_torn_file(tmp_path: Path) -> None:
    """While two workers count and make series, every total only rises and histograms stay whole."""
    with Worker(tmp_path) as first, Worker(tmp_path) as second:
        first.ask("keep_writing()")
        second.ask("keep_writing()")
        reader, before, reads = Reader(tmp_path), {}, 0
        deadline = time.monotonic() + 20
        while (reads < 60 or before.get(ERRORS, 0) < 5_000) and time.monotonic() < deadline:
            snapshot = reader.read()
            values, reads = snapshot.values(), reads + 1
            assert snapshot.unreadable == []
            fell = {series for series, value in before.items() if values[series] < value}
            assert not fell
            for family in snapshot.families:
                if family.kind == "histogram":
                    check_histograms(family)
            before = values
        routes = [labels for name, labels in values if name == "headroom_requests_total"]
        assert len(routes) > 20
        assert values[ERRORS] >= 5_000


def check_histograms(family: Family) -> None:
    """Assert that each histogram has all its buckets, none below the one before, and ends in its count."""
    buckets: list[float] = []
    for (name, _), value in zip(family.rows.series, family.values, strict=True):
        if name.endswith("_bucket"):
            buckets.append(value)
        elif name.endswith("_count"):
            assert len(buckets) == len(catalog.W) + 1
            assert all(lower <= upper for lower, upper in pairwise(buckets))
            assert value == buckets[-1]
            buckets = []


def test_totals_never_fall_while_workers_restart_with_new_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that is carried over again and again loses nothing at any moment that a reader could see."""
    releases = [catalog.ALL, [dataclasses.replace(metric, help=f"{metric.help} New.") for metric in catalog.ALL]]
    stop, seen = threading.Event(), []

    def scrape() -> None:
        reader = Reader(tmp_path)
        while not stop.is_set():
            seen.append(reader.read().values().get(ERRORS, 0.0))

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        for number in range(60):
            rows = releases[number % 2]
            monkeypatch.setattr(catalog, "ALL", rows)
            writer = Writer.open(tmp_path)
            assert writer.worker == "0"
            writer.counter(
                next(metric for metric in rows if metric.name == "headroom_probe_errors_total"), "request"
            ).inc()
            writer.close()
    finally:
        stop.set()
        scraper.join()
    assert Reader(tmp_path).read().values()[ERRORS] == 60
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_a_reader_that_runs_on_shows_the_help_of_the_newer_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar that outlives an update shows the new text, with the counts that were carried over."""
    reader = Reader(tmp_path)
    row = catalog.PROBE_ERRORS
    for text in ("As it was.", "As it is."):
        replaced = dataclasses.replace(row, help=text)
        monkeypatch.setattr(catalog, "ALL", [replaced if metric.name == row.name else metric for metric in catalog.ALL])
        writer = Writer.open(tmp_path)
        writer.counter(replaced, "request").inc()
        snapshot = reader.read()
        writer.close()
    assert {family.name: family.help for family in snapshot.families}["headroom_probe_errors"] == "As it is."
    assert snapshot.values()[ERRORS] == 2


def test_what_series_have_in_common_is_kept_once(tmp_path: Path) -> None:
    """A label's name and value are one object in all series of a snapshot: a scraper has ten thousand of them."""
    writer = Writer.open(tmp_path)
    for metric in (catalog.REQUEST_LATENCY, catalog.LOOP_HOLD):
        writer.histogram(metric, "/items/{id}").observe(0.2)
    rows = [row for family in Reader(tmp_path).read().families for row in family.rows.series]
    pairs = {id(pair): pair for _, labels in rows for pair in labels}
    assert len(pairs) == len(set(pairs.values())) > len(catalog.HOLDS)
    names = {id(name): name for name, _ in rows}
    assert len(names) == len(set(names.values()))
    writer.close()
