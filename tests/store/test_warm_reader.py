"""A reader that has read before: it reads and merges what changed, and says the same as one that begins."""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fastapi_headroom import catalog
from fastapi_headroom.catalog import Metric
from fastapi_headroom.exporter.exposition import Renderer
from fastapi_headroom.store import layout, marks
from fastapi_headroom.store.handles import Counter, Gauge, Histogram
from fastapi_headroom.store.reader import Reader
from fastapi_headroom.store.writer import Writer
from tests.store.workers import Worker

METRICS = (
    Metric("jobs_total", "counter", "queue", ("kind",), "Jobs."),
    Metric("wait_seconds", "histogram", "queue", ("kind",), "Waits.", buckets=(0.5, 2.0, 1e6)),
    Metric("size_bytes", "summary", "queue", ("kind",), "Sizes."),
    Metric("sum_of", "gauge", "queue", ("kind",), "A sum.", mode="livesum"),
    Metric("max_of", "gauge", "queue", ("kind",), "A maximum.", mode="livemax"),
    Metric("min_of", "gauge", "queue", ("kind",), "A minimum.", mode="min"),
    Metric("latest_of", "gauge", "queue", ("kind",), "The latest.", mode="livemostrecent"),
)


@pytest.fixture
def store() -> Iterator[Path]:
    """A directory in memory, where writes to a mapping leave no other trace than marks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name) / "store"


def write(writer: Writer, metric: Metric, label: str, value: float) -> None:
    handle = getattr(writer, metric.kind)(metric, label)
    if isinstance(handle, Histogram):
        handle.observe(value)
    elif isinstance(handle, Gauge):
        handle.set(value)
    elif isinstance(handle, Counter):
        handle.inc(value)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_between_two_reads_the_result_is_a_new_readers(
    store: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes, new series, dead workers, reused slots, deleted, torn and foreign files: sums are the same to the last
    bit, and so is the exposition, and what was returned before stays as it was."""
    monkeypatch.setattr(marks, "BLOCK", 512)
    random = Random(seed)
    writers: list[Writer | None] = [None] * 4
    warm, renderer = Reader(store), Renderer()
    held = []
    for _ in range(120):
        for _ in range(random.choice((0, 1, 1, 3, 30))):
            number = random.randrange(4)
            writer = writers[number]
            if writer is None:
                writers[number] = Writer.open(store)
            elif random.random() < 0.03:
                writers[number] = None
                if random.random() < 0.5:
                    writer.close()
                else:
                    kill(writer)
            else:
                write(
                    writer,
                    random.choice(METRICS),
                    str(random.randrange(12)),
                    random.random() * 10 ** random.randrange(9),
                )
        for writer in writers:
            if writer is not None and random.random() < 0.4:
                writer.tend()
        if random.random() < 0.1:
            disturb(store, random)
        snapshot, fresh = warm.read(), Reader(store)
        expected = fresh.read()
        fresh.close()
        assert snapshot.values() == expected.values()
        assert (snapshot.alive, snapshot.unreadable) == (expected.alive, expected.unreadable)
        for openmetrics in (False, True):
            text = renderer.render(snapshot.families, openmetrics=openmetrics)
            assert text == Renderer().render(expected.families, openmetrics=openmetrics)
        held.append((snapshot.values(), snapshot.families))
    for values, families in held:
        seen = [zip(family.rows.series, family.values, strict=True) for family in families]
        assert values == {series: value for pairs in seen for series, value in pairs}
    for writer in writers:
        if writer is not None:
            writer.close()
    warm.close()


def kill(writer: Writer) -> None:
    """Let a worker end as kill -9 does: the lock is free, the files are as they were, nobody writes any more."""
    slot = writer._files.slot
    assert slot is not None
    slot.release()
    writer._files.leave(copy=False)


def disturb(store: Path, random: Random) -> None:
    """Do to a file what nobody should."""
    paths = sorted(store.glob("*.db"))
    if not paths:
        return
    path = random.choice(paths)
    match random.randrange(3):
        case 0:
            path.unlink()
        case 1:
            (store / "histogram_77.db").unlink(missing_ok=True)
            (store / "histogram_77.db").write_bytes(random.choice((b"", bytes(64), b"\xff" * 64)))
        case 2:
            raw = layout.entry(layout.keys_of(METRICS[0], [str(random.randrange(12))])[0], random.random())
            (store / "counter_78.db").unlink(missing_ok=True)
            (store / "counter_78.db").write_bytes(layout.used_header(8 + len(raw)) + bytes(4) + raw)


def test_a_killed_worker_leaves_no_write_unseen(store: Path) -> None:
    """Workers that count on a thread while marks are settled, and are killed in the middle of it: a reader that has
    read all the time has each of their writes, as a new one has."""
    warm = Reader(store)
    for _ in range(4):
        with Worker(store) as worker:
            worker.ask("keep_writing()")
            for _ in range(12):
                worker.ask("writer.tend()")
                warm.read()
            worker.kill()
        assert warm.read().values() == Reader(store).read().values()
    warm.close()


def test_no_write_is_missed_while_marks_are_settled(store: Path) -> None:
    """Four threads observe, a fifth settles without a pause, a reader reads: in the end it has every observation."""
    writer, warm = Writer.open(store), Reader(store)
    handles = [writer.histogram(catalog.LOOP_HOLD, f"/{number}") for number in range(4)]
    done = threading.Event()

    def observe(handle: Histogram) -> None:
        while not done.is_set():
            handle.observe(0.25)

    def settle() -> None:
        while not done.is_set():
            writer.tend()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=observe, args=(handle,)) for handle in handles]
    threads.append(threading.Thread(target=settle))
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            warm.read()
        done.set()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        sys.setswitchinterval(before)
    values = warm.read().values()
    assert values == Reader(store).read().values()
    assert min(values[f"{catalog.LOOP_HOLD.name}_count", (("http_route", f"/{number}"),)] for number in range(4)) > 100
    writer.close()


@pytest.fixture
def many(store: Path) -> Iterator[tuple[list[Writer], Reader]]:
    """Eight workers with 200 histograms each, settled, and a reader that has read them."""
    writers = [Writer.open(store) for _ in range(8)]
    for writer in writers:
        for number in range(200):
            writer.histogram(catalog.LOOP_HOLD, f"/{number}").observe(0.25)
        writer.tend()
    warm = Reader(store)
    warm.read()
    yield writers, warm
    warm.close()
    for writer in writers:
        writer.close()


def bytes_read(reader: Reader) -> int:
    """Return how many bytes a read asks the kernel for."""

    def so_far() -> int:
        return int(Path("/proc/thread-self/io").read_text().split("rchar:")[1].split()[0])

    before, overhead = so_far(), so_far()
    reader.read()
    return so_far() - overhead - (overhead - before)


def used(store: Path) -> int:
    return sum(layout.read_used(path.read_bytes()[:8]) for path in store.glob("histogram_*.db"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much was read")
def test_only_what_was_written_to_is_read_again(store: Path, many: tuple[list[Writer], Reader]) -> None:
    """With nothing changed a scrape reads a few percent of the files; one observation adds a block, not a file."""
    writers, warm = many
    whole, nothing = used(store), bytes_read(warm)
    assert nothing < whole / 20
    writers[3].histogram(catalog.LOOP_HOLD, "/77").observe(0.25)
    one = bytes_read(warm)
    assert nothing < one < nothing + 2 * marks.BLOCK
    for _ in range(2):  # settled marks say once more that something was written, and then no more
        writers[3].tend()
        warm.read()
    assert bytes_read(warm) == nothing
    assert warm.read().values()[f"{catalog.LOOP_HOLD.name}_count", (("http_route", "/77"),)] == 9


def test_families_without_a_change_are_the_same_objects(many: tuple[list[Writer], Reader]) -> None:
    """What stands on a family, as rendered lines do, need not be made anew when another family changed."""
    writers, warm = many
    before = {family.name: family for family in warm.read().families}
    writers[0].counter(catalog.PROBE_ERRORS, "request").inc()
    warm.read()  # a new series
    writers[0].counter(catalog.PROBE_ERRORS, "request").inc()
    before = {family.name: family for family in warm.read().families}
    writers[0].counter(catalog.PROBE_ERRORS, "request").inc()
    after = {family.name: family for family in warm.read().families}
    assert {name for name in after if after[name] is not before[name]} == {catalog.PROBE_ERRORS.family}


def test_a_file_whose_writer_keeps_no_marks_is_read_as_a_whole(store: Path) -> None:
    """Nobody's word that marks are kept means that every byte is looked at: an older release writes without them."""
    writer = Writer.open(store)
    writer.histogram(catalog.LOOP_HOLD, "/a").observe(0.25)
    writer.close()
    path = store / "histogram_slot0.db"
    with path.open("r+b") as file:
        file.seek(-marks.TABLE, os.SEEK_END)
        file.write(bytes(8))
    warm = Reader(store)
    count = (f"{catalog.LOOP_HOLD.name}_count", (("http_route", "/a"),))
    assert warm.read().values()[count] == 1
    raw = layout.keys_of(catalog.LOOP_HOLD, ["/a"])[-1]
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        index = dict(layout.parse(mapping[:], layout.HEADER, layout.read_used(mapping[:8])))[raw]
        view = memoryview(mapping).cast("d")
        for number in range(1, 4):
            view[index] = number
            assert warm.read().values()[count] == 1 + number
        view.release()
    warm.close()


def test_files_of_a_release_without_marks_are_made_anew(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the files is part of what tells releases apart, in both directions of an update."""
    now = layout.fingerprint(catalog.ALL)
    monkeypatch.setattr(layout, "VERSION", 1)
    assert layout.fingerprint(catalog.ALL) != now


@pytest.mark.parametrize("count", [1, 40])
def test_more_series_than_there_are_blocks_are_marked_too(
    store: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the last place of the table everything is in the last block: coarser, and as right."""
    monkeypatch.setattr(marks, "BLOCK", 8)
    writer, warm = Writer.open(store), Reader(store)
    row = dataclasses.replace(catalog.LOOP_HOLD, buckets=(1.0,) * 0)
    handles = [writer.histogram(row, f"/{number}") for number in range(marks.PLACES + count)]
    writer.tend()
    warm.read()
    for handle in (handles[0], handles[marks.PLACES - 2], handles[-1]):
        handle.observe(0.25)
        assert warm.read().values() == Reader(store).read().values()
        writer.tend()
        assert warm.read().values() == Reader(store).read().values()
    writer.close()
    shutil.rmtree(store)
