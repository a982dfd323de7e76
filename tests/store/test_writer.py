"""The writer: what its handles count, and that nothing of it can harm the app."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.store import handles, layout, region
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import OVERFLOW, Writer
from fastapi_headroom.testing import capture_metrics
from tests.store.workers import Worker

POOL = ("db_client_connection_pool_name", "primary")
DEGRADED = ("headroom_store_degraded", ())


@pytest.fixture
def writer() -> Writer:
    return Writer.in_memory()


def test_a_histogram_counts_into_the_bucket_whose_bound_is_not_below_the_value(writer: Writer) -> None:
    """A value equal to a bound is in its bucket, one beyond all bounds only in +Inf; sum and count follow."""
    wait = writer.histogram(catalog.POOL_WAIT, "primary")
    for value in (0.025, 0.0251, 99.0):
        wait.observe(value)
    wait.observe_many(0.5, 4)
    name = catalog.POOL_WAIT.name
    assert writer.value(f"{name}_bucket", **dict([POOL]), le="0.01") == 0
    assert writer.value(f"{name}_bucket", **dict([POOL]), le="0.025") == 1
    assert writer.value(f"{name}_bucket", **dict([POOL]), le="0.05") == 2
    assert writer.value(f"{name}_bucket", **dict([POOL]), le="10.0") == 6
    assert writer.value(f"{name}_bucket", **dict([POOL]), le="+Inf") == 7
    assert writer.value(f"{name}_count", **dict([POOL])) == 7
    assert writer.value(f"{name}_sum", **dict([POOL])) == pytest.approx(0.025 + 0.0251 + 99 + 2)


def test_a_gauge_is_set_raised_and_lowered(writer: Writer) -> None:
    """Set replaces, inc and dec move."""
    gauge = writer.gauge(catalog.LOOP_TASKS, "0")
    gauge.set(5)
    gauge.inc()
    gauge.dec(3)
    assert writer.value("headroom_event_loop_tasks", worker="0") == 3


def test_a_label_may_be_called_name(writer: Writer) -> None:
    """``value`` takes every label name, also those of its own arguments."""
    writer.gauge(catalog.REMAINING, "pool", "primary").set(0.5)
    assert writer.value("headroom_remaining_ratio", resource="pool", name="primary") == 0.5


def test_of_a_most_recent_gauge_the_latest_write_counts(tmp_path: Path) -> None:
    """The value of the worker that wrote last is read, whichever slot it has."""
    metric = Metric("version", "gauge", "runtime", (), "Latest.", mode="livemostrecent")
    first, second = Writer.open(tmp_path), Writer.open(tmp_path)
    for writer, value in ((first, 1.0), (second, 2.0), (first, 3.0)):
        writer.gauge(metric).set(value)
    assert Reader(tmp_path).read().values()["version", ()] == 3
    second.gauge(metric).dec()
    assert Reader(tmp_path).read().values()["version", ()] == 1
    first.close()
    second.close()


def test_a_full_file_folds_like_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label values so long that the file's address space ends go to ``_overflow``; what is known counts on."""
    monkeypatch.setattr("fastapi_headroom.store.writer.CAPACITY", 1 << 18)
    writer = Writer.open(tmp_path, max_series=500)
    for number in range(400):
        writer.counter(catalog.REQUESTS, f"/{number}" + "x" * 2_000, "ok").inc()
    values = Reader(tmp_path).read().values()
    requests = [value for (name, _), value in values.items() if name == "headroom_requests_total"]
    assert sum(requests) == 400
    assert len(requests) < 130
    assert max(requests) > 270
    writer.close()


def test_a_series_exists_once_its_handle_is_made(writer: Writer) -> None:
    """A counter is there with 0 before it counts, and one that nobody asked for is not there."""
    writer.counter(catalog.POOL_TIMEOUTS, "primary")
    assert writer.value("db_client_connection_timeouts_total", **dict([POOL])) == 0
    with pytest.raises(KeyError):
        writer.value("db_client_connection_timeouts_total", db_client_connection_pool_name="other")


def test_the_same_labels_give_the_same_handle(writer: Writer) -> None:
    """Handles are cached by metric and label values."""
    assert writer.counter(catalog.POOL_TIMEOUTS, "a") is writer.counter(catalog.POOL_TIMEOUTS, "a")
    assert writer.counter(catalog.POOL_TIMEOUTS, "a") is not writer.counter(catalog.POOL_TIMEOUTS, "b")


def test_a_wrong_use_of_the_catalog_is_an_error(writer: Writer) -> None:
    """Too few label values or another kind are programming errors and say what is wrong."""
    with pytest.raises(ValueError, match="db_client_connection_pool_name"):
        writer.counter(catalog.POOL_TIMEOUTS)
    with pytest.raises(ValueError, match="is a counter, not a gauge"):
        writer.gauge(catalog.POOL_TIMEOUTS, "primary")


def test_label_values_that_utf8_cannot_carry_are_replaced(tmp_path: Path) -> None:
    """A lone surrogate in a label, as a raw path may hold, breaks neither the file nor a scrape."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.POOL_TIMEOUTS, "caf\udce9").inc()
    labels = (("db_client_connection_pool_name", "caf?"),)
    values = Reader(tmp_path).read().values()
    assert values["db_client_connection_timeouts_total", labels] == 1
    writer.close()


def test_past_the_cap_label_sets_fold_into_overflow(caplog: pytest.LogCaptureFixture) -> None:
    """Label sets beyond max_series share one series per family; each is counted, the log says it once."""
    writer = Writer.in_memory(max_series=100)
    for number in range(500):
        writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
    samples = writer.samples()
    requests = {labels: value for (name, labels), value in samples.items() if name == "headroom_requests_total"}
    overflow = (("http_route", OVERFLOW), ("outcome", OVERFLOW))
    assert len(samples) <= 102
    assert sum(requests.values()) == 500
    assert requests[overflow] == 500 - (len(requests) - 1)
    assert samples["headroom_label_overflow_total", ()] == requests[overflow]
    assert len([record for record in caplog.records if "HEADROOM_MAX_SERIES" in record.getMessage()]) == 1
    writer.counter(catalog.REQUESTS, "/0", "ok").inc()
    assert writer.value("headroom_requests_total", http_route="/0", outcome="ok") == 2


def test_a_flood_of_label_sets_takes_no_memory_without_end() -> None:
    """What is remembered of folded label sets is bounded too."""
    writer = Writer.in_memory(max_series=100)
    for number in range(2_000):
        writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
    assert len(writer._handles) < 300


def test_our_own_metrics_are_never_folded() -> None:
    """A probe's health stays visible when the cap is reached."""
    writer = Writer.in_memory(max_series=100)
    for number in range(200):
        writer.counter(catalog.REQUESTS, f"/{number}", "ok")
    writer.gauge(catalog.PROBE_UP, "request").set(1)
    assert writer.value("headroom_probe_up", probe="request") == 1


@pytest.mark.parametrize("gil", [True, False])
def test_threads_lose_no_increment(gil: bool) -> None:
    """Eight threads that write to the same series count every one; without the GIL under a lock."""
    if not gil or handles.gil_enabled():
        counter_class, _, histogram_class = handles.classes(gil)
        view = memoryview(bytearray(8 * 5)).cast("B").cast("d")
        counter, histogram = counter_class(view, 0), histogram_class(view, 1, (2, 3), (0.5,), 4)

        def run() -> None:
            for _ in range(20_000):
                counter.inc()
                histogram.observe(0.25)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=run) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
        assert list(view) == [160_000.0, 40_000.0, 160_000.0, 0.0, 1.0]


def test_threads_that_make_the_same_series_share_it(tmp_path: Path) -> None:
    """Series made by eight threads at once are made once each, and what they count adds up."""
    writer = Writer.open(tmp_path)
    barrier = threading.Barrier(8)

    def run() -> None:
        barrier.wait()
        for number in range(200):
            writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = Reader(tmp_path).read().values()
    counts = [value for (name, _), value in values.items() if name == "headroom_requests_total"]
    assert counts == [8.0] * 200
    writer.close()


def test_the_file_is_whole_after_every_single_write(tmp_path: Path) -> None:
    """Readers take no lock: at each moment the file parses, and shows none or all of a new histogram."""
    made = region.Region.create(tmp_path / "histogram_slot0.db", 1 << 20, 0o600)
    mapping, sizes = made._map, []

    class Watched:
        def __getitem__(self, place: slice) -> bytes:
            return mapping[place]

        def __setitem__(self, place: slice, content: bytes) -> None:
            mapping[place] = content
            sizes.append(len(layout.parse(mapping[:], layout.HEADER, layout.read_used(mapping[:8]))))

    made._map = Watched()  # type: ignore[assignment]
    made.place(layout.keys_of(catalog.POOL_WAIT, ["a"]))
    made.place(layout.keys_of(catalog.POOL_WAIT, ["b"]))
    size = len(catalog.W) + 2
    assert sizes == [0, size, size, 2 * size]


# ---------------------------------------------------------------------- full disks
def test_when_the_disk_is_full_known_series_count_on_and_the_state_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused space turns headroom_store_degraded to 1 in the files, is logged once, and no handle fails."""
    writer = Writer.open(tmp_path)
    known = writer.counter(catalog.REQUESTS, "/known", "ok")
    assert Reader(tmp_path).read().values()[DEGRADED] == 0

    def no_space(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(region.os, "posix_fallocate", no_space)
    for number in range(1_000):
        writer.histogram(catalog.LOOP_HOLD, f"/{number}").observe(0.2)
        writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
    known.inc()
    assert writer.degraded
    assert writer.value("headroom_requests_total", http_route="/999", outcome="ok") == 1
    assert writer.value("headroom_request_loop_hold_seconds_count", http_route="/999") == 1
    values = Reader(tmp_path).read().values()
    assert values[DEGRADED] == 1
    assert values["headroom_requests_total", (("http_route", "/known"), ("outcome", "ok"))] == 1
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
    writer.close()


def test_a_limit_on_file_sizes_does_not_end_the_worker(tmp_path: Path) -> None:
    """Under RLIMIT_FSIZE the kernel refuses the files: the worker counts in memory and lives."""
    with Worker(tmp_path, file_size_limit=1 << 20) as worker:
        assert worker.ask("writer.degraded") is True
        assert worker.ask("[writer.counter(ERRORS, str(n)).inc() for n in range(3000)] and True")
        assert worker.ask("writer.value('headroom_probe_errors_total', probe='2999')") == 1
        assert "counted in memory" in worker.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_file_system_that_runs_full_does_not_end_the_worker(small_disk: Path) -> None:
    """On a disk that is really full the worker lives, a restarted one keeps its counters, both are seen."""
    directory = small_disk / "store"
    count = "[writer.counter(ERRORS, str(n)).inc() for n in range(6000)] and True"
    with Worker(directory) as worker:
        assert worker.ask("writer.degraded") is False
        worker.ask(count)
        assert worker.ask("writer.degraded") is True
        worker.ask(count)
        assert worker.ask("writer.value('headroom_probe_errors_total', probe='5999')") == 2
        values = Reader(directory).read().values()
        assert values[DEGRADED] == 1
        assert values["headroom_probe_errors_total", (("probe", "0"),)] == 2
    with Worker(directory) as heir:
        assert heir.slot == 0
        heir.ask(count)
        assert Reader(directory).read().values()["headroom_probe_errors_total", (("probe", "0"),)] == 3


# ---------------------------------------------------------------------- releases
def other_release(monkeypatch: pytest.MonkeyPatch, **changes: Metric) -> None:
    """Let the catalog be that of another release, with some rows replaced or (None) gone."""
    rows = {metric.name: metric for metric in catalog.ALL}
    for field, row in changes.items():
        rows[getattr(catalog, field).name] = row
        monkeypatch.setattr(catalog, field, row)
    monkeypatch.setattr(catalog, "ALL", list(rows.values()))


def test_another_release_carries_the_counters_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters with another help text go on, histograms with other buckets start anew, nothing is doubled."""
    old = Writer.open(tmp_path)
    old.counter(catalog.PROBE_ERRORS, "request").inc(3)
    old.histogram(catalog.POOL_WAIT, "primary").observe(0.02)
    old.histogram(catalog.POOL_USE, "primary").observe(0.02)
    old.close()
    other_release(
        monkeypatch,
        PROBE_ERRORS=dataclasses.replace(catalog.PROBE_ERRORS, help="Said better."),
        POOL_WAIT=dataclasses.replace(catalog.POOL_WAIT, help="Said better."),
        POOL_USE=dataclasses.replace(catalog.POOL_USE, buckets=(0.5, 2.0)),
    )
    new = Writer.open(tmp_path)
    new.counter(catalog.PROBE_ERRORS, "request").inc(1)
    new.histogram(catalog.POOL_WAIT, "primary").observe(0.02)
    new.histogram(catalog.POOL_USE, "primary").observe(0.02)
    snapshot = Reader(tmp_path).read()
    values = snapshot.values()
    assert values["headroom_probe_errors_total", (("probe", "request"),)] == 4
    assert values["db_client_connection_wait_time_seconds_count", (POOL,)] == 2
    assert values["db_client_connection_use_time_seconds_count", (POOL,)] == 1
    bounds = [labels for name, labels in values if name == "db_client_connection_use_time_seconds_bucket"]
    assert [dict(labels)["le"] for labels in bounds] == ["0.5", "2.0", "+Inf"]
    assert {family.name: family.help for family in snapshot.families}["headroom_probe_errors"] == "Said better."
    new.close()


def test_a_damaged_slot_file_is_kept_aside_and_the_worker_starts_anew(tmp_path: Path) -> None:
    """A slot whose file is torn is still claimed; the old file stays under another name."""
    writer = Writer.open(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "request").inc(3)
    writer.close()
    with (tmp_path / "counter_slot0.db").open("r+b") as file:
        file.truncate(40)
    again = Writer.open(tmp_path)
    assert (again.worker, again.degraded) == ("0", False)
    again.counter(catalog.PROBE_ERRORS, "request").inc()
    assert Reader(tmp_path).read().values()["headroom_probe_errors_total", (("probe", "request"),)] == 1
    assert (tmp_path / "counter_slot0.db.torn").exists()
    again.close()


# ---------------------------------------------------------------------- testing helper
def test_captured_metrics_need_no_files(tmp_path: Path) -> None:
    """Inside the block every writer is the captured one, afterwards writers are real again."""
    with capture_metrics() as metrics:
        writer = Writer.open(tmp_path)
        writer.counter(catalog.PROBE_ERRORS, "request").inc(2)
        assert metrics.value("headroom_probe_errors_total", probe="request") == 2
        assert "headroom_probe_errors_total" in metrics
        assert "headroom_requests_total" not in metrics
    assert list(tmp_path.iterdir()) == []
    real = Writer.open(tmp_path)
    assert (tmp_path / "slot0.lock").exists()
    real.close()
