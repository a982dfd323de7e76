"""Worker slots: one owner at a time, taken over with their counters, never lost to a dead process."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastapi_headroom import catalog
from fastapi_headroom.errors import StoreError
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.slot import prepare_directory
from fastapi_headroom.store.writer import Writer
from tests.store.workers import Worker

ERRORS = ("headroom_probe_errors_total", (("probe", "request"),))
RESTARTS = ("headroom_worker_restarts_total", ())
COUNT_ERRORS = "writer.counter(ERRORS, 'request').inc({})"


def test_workers_take_the_lowest_free_slots(tmp_path: Path) -> None:
    """Processes that run together hold different slots, and one that comes later fills the gap."""
    with Worker(tmp_path) as first, Worker(tmp_path) as second, Worker(tmp_path) as third:
        assert [first.slot, second.slot, third.slot] == [0, 1, 2]
        second.kill()
        with Worker(tmp_path) as fourth:
            assert fourth.slot == 1
            assert Reader(tmp_path).read().alive == [0, 1, 2]


def test_workers_that_start_at_once_never_share_a_slot(tmp_path: Path) -> None:
    """Eight processes that race for slots get eight, and what all wrote adds up."""
    with ThreadPoolExecutor(8) as pool:
        workers = list(pool.map(lambda _: Worker(tmp_path), range(8)))
    try:
        assert sorted(worker.slot for worker in workers) == list(range(8))
        for worker in workers:
            worker.ask(COUNT_ERRORS.format(1))
        assert Reader(tmp_path).read().values()[ERRORS] == 8
    finally:
        for worker in workers:
            worker.kill()


def test_a_restarted_worker_goes_on_from_the_counters_of_the_killed_one(tmp_path: Path) -> None:
    """After kill -9 the slot's counters go on, its gauges are gone, the restart is counted and no file is added."""
    reader = Reader(tmp_path)
    with Worker(tmp_path) as first:
        first.ask(COUNT_ERRORS.format(5))
        first.ask("writer.histogram(catalog.POOL_WAIT, 'primary').observe(0.02)")
        first.ask("writer.gauge(catalog.LOOP_TASKS, '0').set(7)")
        first.ask("writer.gauge(catalog.REMAINING, 'pool', 'primary').set(7)")
        assert reader.read().values()["headroom_event_loop_tasks", (("worker", "0"),)] == 7
        first.kill()
    dead = reader.read()
    assert dead.alive == []
    assert dead.values()[ERRORS] == 5
    assert ("headroom_event_loop_tasks", (("worker", "0"),)) not in dead.values()
    files = {path.name for path in tmp_path.iterdir()}
    with Worker(tmp_path) as second:
        assert second.slot == 0
        assert reader.read().values()[ERRORS] == 5
        second.ask(COUNT_ERRORS.format(2))
        second.ask("writer.histogram(catalog.POOL_WAIT, 'primary').observe(0.02)")
        values = reader.read().values()
        assert values[ERRORS] == 7
        assert values[RESTARTS] == 1
        pool = ("db_client_connection_pool_name", "primary")
        assert values["db_client_connection_wait_time_seconds_count", (pool,)] == 2
        assert values["db_client_connection_wait_time_seconds_bucket", (pool, ("le", "0.025"))] == 2
        assert ("headroom_event_loop_tasks", (("worker", "0"),)) not in values
        assert ("headroom_remaining_ratio", (("name", "primary"), ("resource", "pool"))) not in values
        assert {path.name for path in tmp_path.iterdir()} == files - {"gauge_livemax_slot0.db"}


def test_a_forked_child_leaves_the_files_of_its_parent_alone(tmp_path: Path) -> None:
    """What a child writes through inherited handles is not counted, and the parent counts on."""
    with Worker(tmp_path) as parent:
        parent.ask(COUNT_ERRORS.format(1))
        child = parent.ask("fork_writing(1000)")
        try:
            parent.ask(COUNT_ERRORS.format(1))
            values = Reader(tmp_path).read().values()
            assert values[ERRORS] == 2
            assert ("headroom_probe_errors_total", (("probe", "cache"),)) not in values
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_slot_of_its_dead_parent(tmp_path: Path) -> None:
    """The slot is free once its owner is dead, although a child of the owner lives on."""
    with Worker(tmp_path) as parent:
        child = parent.ask("fork_writing(1)")
        try:
            assert Reader(tmp_path).read().alive == [0]
            os.kill(parent.process.pid, signal.SIGKILL)
            parent.process.wait(10)
            os.kill(child, 0)  # it lives
            assert Reader(tmp_path).read().alive == []
            with Worker(tmp_path) as heir:
                assert heir.slot == 0
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_serves_claims_a_slot_of_its_own(tmp_path: Path) -> None:
    """Parent and child count into different slots, and both are in the sum."""
    with Worker(tmp_path) as parent:
        parent.ask(COUNT_ERRORS.format(1))
        child, slot = parent.ask("fork_serving(10)")
        try:
            assert slot == "1"
            snapshot = Reader(tmp_path).read()
            assert snapshot.alive == [0, 1]
            assert snapshot.values()[ERRORS] == 11
        finally:
            os.kill(child, signal.SIGKILL)


def test_restarts_leave_no_files_behind(tmp_path: Path) -> None:
    """A hundred restarts under the eyes of a reader use one slot and keep every count."""
    reader = Reader(tmp_path)
    for _ in range(100):
        writer = Writer.open(tmp_path)
        assert writer.worker == "0"
        writer.counter(catalog.PROBE_ERRORS, "request").inc()
        reader.read()
        writer.close()
    assert reader.read().values()[ERRORS] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_slot0.db", "slot0.lock"]


def test_handles_outlive_the_slot(tmp_path: Path) -> None:
    """After close handles still take values, into memory: the files belong to the next owner."""
    writer = Writer.open(tmp_path)
    counter = writer.counter(catalog.PROBE_ERRORS, "request")
    counter.inc()
    writer.close()
    writer.close()
    counter.inc(10)
    writer.counter(catalog.PROBE_ERRORS, "cache").inc()
    assert writer.value("headroom_probe_errors_total", probe="request") == 11
    assert Reader(tmp_path).read().values()[ERRORS] == 1


def test_the_directory_is_private_unless_the_group_is_let_in(tmp_path: Path) -> None:
    """A new directory has mode 0700, with group_readable 0750, and a kept one is widened when asked."""
    directory = tmp_path / "a" / "store"
    before = os.umask(0o077)
    try:
        prepare_directory(directory, group_readable=False)
        assert directory.stat().st_mode & 0o777 == 0o700
        writer = Writer.open(directory, group_readable=True)
    finally:
        os.umask(before)
    assert directory.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}
    writer.close()


@pytest.mark.parametrize("bad", ["file", "/proc/headroom/store"])
def test_an_unusable_directory_is_named_with_its_remedy(
    bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names the directory and the setting; a writer goes on in memory and says so in one line."""
    (tmp_path / "file").write_text("")
    directory = tmp_path / bad  # an absolute second part replaces the first
    with pytest.raises(StoreError, match="HEADROOM_DIRECTORY"):
        prepare_directory(directory, group_readable=False)
    writer = Writer.open(directory)
    assert writer.degraded
    writer.counter(catalog.PROBE_ERRORS, "request").inc()
    assert writer.value("headroom_probe_errors_total", probe="request") == 1
    assert writer.value("headroom_store_degraded") == 1
    assert len([record for record in caplog.records if str(directory) in record.getMessage()]) == 1


def test_slots_work_without_open_file_description_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has flock only, slots are exclusive, seen as alive, and free after their owner."""
    monkeypatch.setattr("fastapi_headroom.store.slot._HAS_OFD_LOCKS", False)
    first, second = Writer.open(tmp_path), Writer.open(tmp_path)
    reader = Reader(tmp_path)
    assert (first.worker, second.worker) == ("0", "1")
    assert reader.read().alive == [0, 1]
    first.close()
    assert reader.read().alive == [1]
    third = Writer.open(tmp_path)
    assert third.worker == "0"
    second.close()
    third.close()


def test_a_directory_that_is_emptied_under_its_workers_is_taken_anew(tmp_path: Path) -> None:
    """Whoever wipes the directory loses what was there; the next worker is seen, the old one does no harm."""
    reader = Reader(tmp_path)
    first = Writer.open(tmp_path)
    counter = first.counter(catalog.PROBE_ERRORS, "request")
    counter.inc(5)
    assert reader.read().alive == [0]
    for path in tmp_path.iterdir():
        path.unlink()
    second = Writer.open(tmp_path)
    second.counter(catalog.PROBE_ERRORS, "request").inc()
    counter.inc(5)
    first.gauge(catalog.REMAINING, "pool", "primary").set(1)
    first.close()
    snapshot = reader.read()
    assert snapshot.alive == [0]
    assert snapshot.values()[ERRORS] == 1
    second.close()
