"""Degraded to memory and back: what is counted without a disk is seen, and moves to the files without a loss."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from fastapi_headroom import catalog
from fastapi_headroom.store import memory, region
from fastapi_headroom.store.reader import Reader, held_here
from fastapi_headroom.store.writer import Writer
from tests.store.workers import Worker

DEGRADED = ("headroom_store_degraded", ())
ERRORS = ("headroom_probe_errors_total", (("probe", "request"),))
WAITS = ("db_client_connection_wait_time_seconds_count", (("db_client_connection_pool_name", "primary"),))
TASKS = ("headroom_event_loop_tasks", (("worker", "0"),))


class Disk:
    """A disk whose space can be taken away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = os.posix_fallocate

        def fallocate(fd: int, offset: int, length: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd, offset, length)

        monkeypatch.setattr(region.os, "posix_fallocate", fallocate)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A directory that cannot be made yet: a file has its parent's name."""
    (tmp_path / "blocked").write_text("")
    yield tmp_path / "blocked" / "store"


def write_some(writer: Writer) -> None:
    """Count once in each kind of series."""
    writer.counter(catalog.PROBE_ERRORS, "request").inc(2)
    writer.histogram(catalog.POOL_WAIT, "primary").observe(0.02)
    writer.gauge(catalog.LOOP_TASKS, "0").set(7)


def elsewhere(directory: Path) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return what another process sees: the files alone, by prometheus_client's own collector."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in MultiProcessCollector(None, str(directory)).collect()
        for sample in family.samples
    }


# ---------------------------------------------------------------------- an unusable directory
def test_a_worker_without_a_directory_is_seen_by_the_reader_in_its_process(store: Path) -> None:
    """Counters, histograms and gauges in memory are in the scrape of the worker itself, as is that it degraded."""
    writer = Writer.open(store)
    write_some(writer)
    values = Reader(store).read().values()
    assert (values[ERRORS], values[WAITS], values[TASKS], values[DEGRADED]) == (2, 1, 7, 1)
    assert Reader(store.with_name("another")).read().values() == {}
    assert held_here(store) and not held_here(store.with_name("another"))
    writer.close()
    assert not held_here(store)
    assert Reader(store).read().values() == {}


def test_workers_without_slots_share_no_label(store: Path) -> None:
    """A worker that has no slot is not labelled as the worker of slot 0."""
    writer = Writer.open(store)
    assert writer.worker == f"memory-{os.getpid()}"
    writer.close()


def test_rights_that_come_back_bring_the_counts_to_the_files(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once the directory can be made, everything counted is in files, handles write there, and it is said once."""
    writer = Writer.open(store)
    write_some(writer)
    writer.tend()
    assert writer.degraded
    store.parent.unlink()
    writer.tend()
    assert not writer.degraded
    write_some(writer)
    for values in (Reader(store).read().values(), elsewhere(store)):
        assert (values[ERRORS], values[WAITS], values[TASKS], values[DEGRADED]) == (4, 2, 7, 0)
    assert Reader(store).read().alive == [0]
    assert len([record for record in caplog.records if str(store) in record.getMessage()]) == 2
    writer.close()


def test_counts_are_added_to_those_that_the_slot_has(tmp_path: Path, store: Path) -> None:
    """A worker that gets a slot late goes on from the counters of the slot's last owner."""
    late = Writer.open(store)
    write_some(late)
    store.parent.unlink()
    earlier = Writer.open(store)
    write_some(earlier)
    earlier.close()
    late.tend()
    values = elsewhere(store)
    assert (values[ERRORS], values[WAITS]) == (4, 2)
    late.close()


def test_a_child_of_a_degraded_worker_shows_nothing_of_its_parent(store: Path) -> None:
    """After a fork the parent's counts in memory are the parent's alone."""
    writer = Writer.open(store)
    write_some(writer)
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(done, repr(Reader(store).read().values()).encode())
        os._exit(0)
    assert os.read(ready, 10_000) == b"{}"
    os.waitpid(child, 0)
    writer.close()


# ---------------------------------------------------------------------- a full disk
def test_space_that_comes_back_brings_the_counts_to_the_files(tmp_path: Path, disk: Disk) -> None:
    """Series for which there was no space are in the exporting worker's scrape at once, in files when there is."""
    writer = Writer.open(tmp_path)
    known = writer.counter(catalog.REQUESTS, "/known", "ok")
    write_some(writer)
    disk.full = True
    for number in range(1_000):
        writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
        writer.histogram(catalog.LOOP_HOLD, f"/{number}").observe(0.2)
    writer.gauge(catalog.QUEUE_DEPTH, "redis", "mail", "0").set(5)
    known.inc()
    reader = Reader(tmp_path)
    here = reader.read().values()
    assert here[DEGRADED] == 1
    assert sum(value for (name, _), value in here.items() if name == "headroom_requests_total") == 1_001
    assert sum(value for (name, _), value in elsewhere(tmp_path).items() if name == "headroom_requests_total") < 1_000
    writer.tend()
    assert writer.degraded
    disk.full = False
    writer.tend()
    assert not writer.degraded
    assert memory_of(tmp_path) == 0
    here[DEGRADED] = 0
    assert reader.read().values() == elsewhere(tmp_path) == here
    known.inc()
    writer.counter(catalog.REQUESTS, "/999", "ok").inc()
    writer.histogram(catalog.LOOP_HOLD, "/999").observe(0.2)
    values = elsewhere(tmp_path)
    assert values["headroom_requests_total", (("http_route", "/999"), ("outcome", "ok"))] == 2
    assert values["headroom_request_loop_hold_seconds_count", (("http_route", "/999"),)] == 2
    writer.close()


def memory_of(directory: Path) -> int:
    """Return how many regions of this process are in memory only."""
    with memory.standing(directory) as held:
        return len(held)


def test_space_that_comes_back_in_part_is_used_in_part(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk runs full again on the way back, what moved is in the files, the rest waits, nothing is twice."""
    writer = Writer.open(tmp_path)
    write_some(writer)
    disk.full = True
    for number in range(2_000):
        writer.counter(catalog.REQUESTS, f"/{number}", "ok").inc()
    disk.full = False
    calls, fallocate = 0, region.os.posix_fallocate

    def twice(fd: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        disk.full = calls > 2
        fallocate(fd, offset, length)

    monkeypatch.setattr(region.os, "posix_fallocate", twice)
    writer.tend()
    assert writer.degraded
    values = Reader(tmp_path).read().values()
    in_files = sum(value for (name, _), value in elsewhere(tmp_path).items() if name == "headroom_requests_total")
    assert 300 < in_files < 2_000
    assert sum(value for (name, _), value in values.items() if name == "headroom_requests_total") == 2_000
    calls = -1_000
    writer.tend()
    assert not writer.degraded
    in_files = sum(value for (name, _), value in elsewhere(tmp_path).items() if name == "headroom_requests_total")
    assert in_files == 2_000
    writer.close()


def test_a_worker_that_starts_on_a_full_disk_is_alive_and_known_to_be_degraded(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is held although it has no files, so that every reader sees it and that it counts in memory."""
    with Worker(tmp_path, file_size_limit=1 << 20) as worker:
        reader = Reader(tmp_path)
        assert reader.read().alive == [worker.slot]
        assert DEGRADED not in reader.read().values()  # it might be about to make its files
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        assert reader.read().values()[DEGRADED] == 1
    assert DEGRADED not in reader.read().values()
    disk.full = True
    writer = Writer.open(tmp_path)
    write_some(writer)
    assert writer.worker == "0"
    assert Reader(tmp_path).read().values()[ERRORS] == 2
    disk.full = False
    writer.tend()
    assert elsewhere(tmp_path)[ERRORS] == 2
    writer.close()


@pytest.mark.parametrize("delete", [False, True])
def test_no_count_is_lost_or_doubled_while_series_move(tmp_path: Path, disk: Disk, delete: bool) -> None:
    """Eight threads count while space goes and comes, or the directory too: totals are exact at the end, and as
    long as nobody deletes files the reader never sees them fall."""
    rounds = 40
    writer = Writer.open(tmp_path)
    stop = threading.Event()
    counted = [0] * 8

    def count(number: int) -> None:
        while not stop.is_set():
            shared = writer.counter(catalog.REQUESTS, "/shared", "ok")
            own = writer.histogram(catalog.LOOP_HOLD, f"/{number}")
            in_flight = writer.gauge(catalog.REQUESTS_ACTIVE, "GET")
            for _ in range(200):
                in_flight.inc()
                shared.inc()
                own.observe(0.2)
                in_flight.dec()
            counted[number] += 200

    total = ("headroom_requests_total", (("http_route", "/shared"), ("outcome", "ok")))
    fell: list[tuple[float, float]] = []
    waiting = [0]

    def scrape() -> None:
        reader, before = Reader(tmp_path), 0.0
        while not stop.is_set():
            value = reader.read().values().get(total, 0.0)
            if value < before:
                fell.append((before, value))
            before = value

    disk.full = True
    threads = [threading.Thread(target=count, args=(number,)) for number in range(8)]
    threads.append(threading.Thread(target=scrape))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for number in range(rounds):
            writer.counter(catalog.REQUESTS, f"/{number}" + "x" * 70_000, "ok")  # more than is reserved
            waiting[0] += writer.degraded
            disk.full = False
            writer.tend()
            assert not writer.degraded
            disk.full = True
            if delete:
                shutil.rmtree(tmp_path)
                disk.full = False
                writer.tend()
                assert not writer.degraded
                disk.full = True
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert waiting[0] > rounds / 2
    assert delete or not fell
    values = elsewhere(tmp_path)
    assert values[total] == sum(counted) > 10_000
    for number in range(8):
        labels = (("http_route", f"/{number}"),)
        assert values["headroom_request_loop_hold_seconds_count", labels] == counted[number]
        assert values["headroom_request_loop_hold_seconds_sum", labels] == pytest.approx(counted[number] * 0.2)
    active = [value for (name, _), value in values.items() if name == "http_server_active_requests"]
    assert active == [0]
    writer.close()


# ---------------------------------------------------------------------- a deleted directory
def test_a_deleted_directory_is_made_again_with_everything_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two workers whose directory is deleted make it again, keep their slots, and their totals go on."""
    store = tmp_path / "run" / "store"
    writers = [Writer.open(store), Writer.open(store)]
    for writer in writers:
        write_some(writer)
    before = elsewhere(store)
    shutil.rmtree(store.parent)
    writers[0].counter(catalog.PROBE_ERRORS, "request").inc(0)
    for writer in reversed(writers):
        writer.tend()
    assert [writer.degraded for writer in writers] == [False, False]
    assert elsewhere(store) == Reader(store).read().values() == before
    assert Reader(store).read().alive == [0, 1]
    write_some(writers[1])
    assert elsewhere(store)[ERRORS] == 6
    assert store.stat().st_mode & 0o777 == 0o700
    assert len([record for record in caplog.records if "was deleted" in record.getMessage()]) == 2
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("gone", ["slot0.lock", "counter_slot0.db", "histogram_slot0.db", "gauge_livesum_slot0.db"])
def test_a_single_file_that_is_deleted_comes_back(tmp_path: Path, gone: str) -> None:
    """Whichever file of a living worker is deleted, its series are back with their values, once."""
    writer = Writer.open(tmp_path)
    write_some(writer)
    before = elsewhere(tmp_path)
    (tmp_path / gone).unlink()
    writer.tend()
    write_some(writer)
    values = elsewhere(tmp_path)
    assert (values[ERRORS], values[WAITS], values[TASKS]) == (4, 2, 7)
    assert values.keys() == before.keys()
    assert Reader(tmp_path).read().alive == [0]
    writer.close()


def test_a_slot_that_went_to_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    """When a new worker took the slot after the deletion, the old one keeps to memory and the new one is right."""
    old = Writer.open(tmp_path)
    write_some(old)
    (tmp_path / "slot0.lock").unlink()
    new = Writer.open(tmp_path)
    assert new.worker == "0"
    old.tend()
    write_some(old)
    write_some(new)
    assert old.degraded
    assert elsewhere(tmp_path)[ERRORS] == 4
    new.close()
    old.tend()
    assert not old.degraded
    assert elsewhere(tmp_path)[ERRORS] == 6
    old.close()


def test_a_worker_that_lost_its_slot_to_another_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it counts is in no scrape meanwhile: one line says whose slot that is, and what to do."""
    old = Writer.open(tmp_path)
    shutil.rmtree(tmp_path)
    new = Writer.open(tmp_path)
    for _ in range(3):
        old.tend()
    (line,) = [record.message for record in caplog.records if "in no scrape" in record.message]
    assert "slot 0 of" in line and "restart this worker" in line
    old.close(), new.close()


def test_a_closed_worker_leaves_the_files_of_its_successor(tmp_path: Path) -> None:
    """A worker whose lock file was deleted removes no live gauges when it ends: they are another's by now."""
    old = Writer.open(tmp_path)
    (tmp_path / "slot0.lock").unlink()
    new = Writer.open(tmp_path)
    write_some(new)
    old.close()
    assert elsewhere(tmp_path)[TASKS] == 7
    new.close()


def test_tending_a_healthy_store_costs_next_to_nothing(tmp_path: Path) -> None:
    """A second's tend of a worker that is well takes well under a millisecond and touches no file."""
    writer = Writer.open(tmp_path)
    write_some(writer)
    changed = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    began = time.process_time()
    for _ in range(100):
        writer.tend()
    assert (time.process_time() - began) / 100 < 0.001
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == changed
    writer.close()


def test_a_directory_that_may_not_be_looked_into_is_not_taken_for_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to ask, slot and files are kept and written to."""
    writer = Writer.open(tmp_path)
    write_some(writer)

    def denied(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", denied)
        writer.tend()
    assert not writer.degraded
    write_some(writer)
    assert elsewhere(tmp_path)[ERRORS] == 4
    writer.close()
