"""Damage that one file, or one process, can do: it costs what it hit and nothing else, and it does not pile up."""

from __future__ import annotations

import errno
import logging
import math
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from fastapi_headroom import catalog
from fastapi_headroom.exporter.locks import FileLock, is_held, slots_alive
from fastapi_headroom.store import layout, marks, region, slot_files
from fastapi_headroom.store.carry import carry_over
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.support.descriptors import store_descriptors
from tests.support.no_files import a_dangling_link, a_directory, a_pipe

ERRORS = ("headroom_probe_errors_total", (("probe", "request"),))
WAITS = "db_client_connection_wait_time_seconds"
POOL = (("db_client_connection_pool_name", "primary"),)
Damage = Callable[[Path], None]


def write_some(directory: Path) -> Writer:
    """Start a worker with a counter and a histogram."""
    writer = Writer.open(directory)
    writer.counter(catalog.PROBE_ERRORS, "request").inc(2)
    writer.histogram(catalog.POOL_WAIT, "primary").observe(0.02)
    return writer


def within(seconds: float, call: Callable[[], object]) -> None:
    """Call on a thread and fail when that does not return in time."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


def add_entry(path: Path, raw: bytes, value: float = 1.0) -> None:
    """Append an entry to a file, as its owner would."""
    with path.open("r+b") as file:
        used = layout.read_used(file.read(layout.HEADER))
        content = layout.entry(raw, value)
        file.seek(used)
        file.write(content)
        file.seek(0)
        file.write(layout.used_header(used + len(content)))


# ---------------------------------------------------------------------- what a reader meets
@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_a_damaged_table_of_marks_costs_nothing(tmp_path: Path, number: float) -> None:
    """Where the blocks of a file begin may be any number: the file is read as a whole, and what is written is seen."""
    writer = write_some(tmp_path)
    path = tmp_path / "histogram_slot0.db"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - marks.TABLE + 8)
        file.write(struct.pack("d", number))
    writer.tend()  # no flag is set now
    reader = Reader(tmp_path)
    for count in (1, 2, 3):
        snapshot = reader.read()
        assert (snapshot.unreadable, snapshot.values()[f"{WAITS}_count", POOL]) == ([], count)
        writer.histogram(catalog.POOL_WAIT, "primary").observe(0.02)
    writer.close()


def test_a_pipe_with_the_name_of_a_lock_holds_nobody_up(tmp_path: Path) -> None:
    """Reading, /healthz, a sidecar's look and a new worker's go past it; none waits for its other end."""
    writer = write_some(tmp_path)
    for name in ("slot1.lock", "exporter.lock", "sidecar.lock"):
        a_pipe(tmp_path / name)
    found: list[object] = []
    within(20, lambda: found.append(Reader(tmp_path).read().values()[ERRORS]))
    within(20, lambda: found.append(slots_alive(tmp_path)))
    within(20, lambda: found.append(is_held(tmp_path / "sidecar.lock")))
    within(20, lambda: found.append(FileLock.acquire(tmp_path / "exporter.lock") is not None))
    within(20, lambda: found.append(Writer.open(tmp_path).worker))
    assert found == [2.0, [0], False, True, "2"]
    writer.close()


@pytest.mark.parametrize("make", [a_pipe, a_directory, a_dangling_link])
def test_a_slot_whose_lock_is_no_file_is_passed_over(tmp_path: Path, make: Damage) -> None:
    """The worker takes the next slot, and counts in files."""
    make(tmp_path / "slot0.lock")
    writer = write_some(tmp_path)
    assert (writer.worker, writer.degraded) == ("1", False)
    assert Reader(tmp_path).read().values()[ERRORS] == 2
    writer.close()


def test_a_key_nested_without_end_costs_its_file_only(tmp_path: Path) -> None:
    """A key that the parser gives up on is a damaged key like any other."""
    writer = write_some(tmp_path)
    (tmp_path / "counter_77.db").write_bytes(layout.used_header(8) + bytes(4))
    add_entry(tmp_path / "counter_77.db", b"[" * 100_000)
    snapshot = Reader(tmp_path).read()
    assert (snapshot.unreadable, snapshot.values()[ERRORS]) == (["counter_77.db"], 2)
    writer.close()


def test_files_that_something_makes_without_end_fill_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A program that leaves ever new files in the directory is named a hundred times, and then once more in sum."""
    reader = Reader(tmp_path)
    for number in range(150):
        path = tmp_path / f"journal-{number}.db"
        path.write_text("not ours")
        assert reader.read().unreadable == [path.name]
        path.unlink()
    assert 100 < len(caplog.records) < 105
    assert "are counted and not named" in caplog.records[-1].getMessage()


def test_a_gauge_with_a_label_called_pid_has_it_once(tmp_path: Path) -> None:
    """In mode all the process takes the label, as prometheus_client has it: of a name that is there twice
    Prometheus refuses the whole scrape."""
    path = tmp_path / "gauge_all_4711.db"
    path.write_bytes(layout.used_header(8) + bytes(4))
    add_entry(path, layout.key("t_jobs", "t_jobs", {"pid": "mine", "queue": "q"}, "Jobs."), 3.0)
    values = Reader(tmp_path).read().values()
    assert values["t_jobs", (("pid", "4711"), ("queue", "q"))] == 3.0
    (family,) = MultiProcessCollector(CollectorRegistry(), str(tmp_path)).collect()
    assert {tuple(sorted(sample.labels.items())) for sample in family.samples} == {
        labels for name, labels in values if name == "t_jobs"
    }


# ---------------------------------------------------------------------- what the next owner of a slot meets
def spoil_a_key(path: Path) -> None:
    """Turn one byte of a key into what no UTF-8 has."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"request"', b'"r\xffquest"'))


def add_no_labels(path: Path) -> None:
    add_entry(path, b'["t_x", "t_x_total", ["no labels"], "Text."]')


@pytest.mark.parametrize("damage", [spoil_a_key, add_no_labels])
def test_a_key_that_no_reader_can_read_ends_with_its_owner(tmp_path: Path, damage: Damage) -> None:
    """Else all of the slot's counters would be missing from every scrape, restart after restart."""
    write_some(tmp_path).close()
    damage(tmp_path / "counter_slot0.db")
    reader = Reader(tmp_path)
    assert reader.read().unreadable == ["counter_slot0.db"]
    again = write_some(tmp_path)
    assert (again.worker, again.degraded) == ("0", False)
    snapshot = reader.read()
    assert (snapshot.unreadable, snapshot.values()[ERRORS]) == ([], 2)
    assert (tmp_path / "counter_slot0.db.torn").exists()
    again.close()


def test_what_is_no_number_ends_with_its_owner(tmp_path: Path) -> None:
    """A worker that counted NaN or an infinity does not leave it to all its successors; what is beside it goes on."""
    writer = write_some(tmp_path)
    writer.counter(catalog.PROBE_ERRORS, "cache").inc(math.nan)
    writer.histogram(catalog.POOL_WAIT, "primary").observe(math.inf)
    writer.close()
    again = write_some(tmp_path)
    again.counter(catalog.PROBE_ERRORS, "cache").inc()
    values = Reader(tmp_path).read().values()
    assert values["headroom_probe_errors_total", (("probe", "cache"),)] == 1
    assert values[ERRORS] == 4
    assert (values[f"{WAITS}_sum", POOL], values[f"{WAITS}_count", POOL]) == (0.02, 3)
    again.close()


def test_labels_that_are_no_text_are_not_carried_over() -> None:
    """A damaged key in another release's file is dropped, and the new worker starts."""
    metric = catalog.PROBE_ERRORS
    bad = b'["%b", "%b", {"probe": ["request"]}, "Text."]' % (metric.family.encode(), metric.name.encode())
    good = layout.keys_of(metric, ["request"])[0]
    assert carry_over([(bad, 1.0), (good, 2.0), (b"[" * 100_000, 3.0)], "counter", catalog.ALL) == {good: 2.0}


def test_a_slot_that_cannot_be_opened_takes_no_descriptor_each_second(tmp_path: Path) -> None:
    """Files that were opened before one that cannot be are let go of: the worker tries again and again."""
    write_some(tmp_path).close()
    (tmp_path / "histogram_slot0.db").unlink()
    (tmp_path / "histogram_slot0.db").symlink_to("elsewhere")
    writer = write_some(tmp_path)
    assert writer.degraded
    before = store_descriptors(tmp_path)
    for _ in range(20):
        writer.tend()
    assert store_descriptors(tmp_path) == before
    (tmp_path / "histogram_slot0.db").unlink()
    writer.tend()
    assert not writer.degraded
    assert Reader(tmp_path).read().values()[ERRORS] == 4
    writer.close()


def test_exemplars_that_cannot_be_kept_degrade_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a file for exemplars all counts are in files: one line says so, however long it lasts, and it ends."""
    caplog.set_level(logging.INFO)
    writer = write_some(tmp_path)
    ring = tmp_path / "exemplars_slot0.ring"
    ring.mkdir()
    monkeypatch.setattr(slot_files, "_RING_RETRY_SECONDS", 0.0)
    histogram = writer.histogram(catalog.POOL_WAIT, "primary")
    for _ in range(5):
        writer.exemplar(histogram, 0.02, 1, 2)
        assert not writer.degraded
        writer.tend()
    assert len([record for record in caplog.records if "fastapi-headroom" in record.getMessage()]) == 1
    ring.rmdir()
    writer.exemplar(histogram, 0.02, 1, 2)
    assert ring.stat().st_size > 0
    writer.close()
    ring.unlink()
    ring.mkdir()
    again = write_some(tmp_path)
    assert not again.degraded
    again.close()


def test_a_disk_that_is_full_while_kept_files_are_taken_over_costs_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that counted in memory meets its predecessor's files and no room in the first of them: the others are
    kept open, nothing takes their place, and with room again all counts of both are there."""
    store = tmp_path / "blocked" / "store"
    write_some(tmp_path / "kept").close()
    (tmp_path / "blocked").write_text("")
    writer = write_some(store)
    for number in range(400):  # more than the counters' file has room for
        writer.counter(catalog.PROBE_ERRORS, f"{number}-{'x' * 100}").inc()
    (tmp_path / "blocked").unlink()
    (tmp_path / "blocked").mkdir()
    (tmp_path / "kept").rename(store)
    real = os.posix_fallocate

    def no_growth(fd: int, offset: int, length: int) -> None:
        if offset and length != marks.TABLE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, length)

    monkeypatch.setattr(region.os, "posix_fallocate", no_growth)
    writer.tend()
    before = store_descriptors(store)
    writer.tend()
    assert writer.degraded
    assert store_descriptors(store) == before
    monkeypatch.undo()
    writer.tend()
    assert not writer.degraded
    values = Reader(store).read().values()
    assert (values[ERRORS], values[f"{WAITS}_count", POOL]) == (4, 2)
    assert sum(value for (name, _), value in values.items() if name == ERRORS[0]) == 404
    writer.close()
