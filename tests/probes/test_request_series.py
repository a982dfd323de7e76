"""The series of a request: one go, handle by handle and under a lock, all count the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastapi_headroom.ledger import ACCEPT_QUEUE, DB, LOOP_BLOCKED, ON_LOOP, OTHER, Ledger
from fastapi_headroom.probes import request_series
from fastapi_headroom.probes.request_series import LockedResponseSeries, ResponseSeries, Table
from fastapi_headroom.store import handles
from fastapi_headroom.store import writer as writer_module
from fastapi_headroom.store.moving import move
from fastapi_headroom.store.region import Region
from fastapi_headroom.store.writer import Samples, Writer

Series = type[ResponseSeries]
KINDS = [pytest.param(ResponseSeries, id="one go"), pytest.param(LockedResponseSeries, id="locked")]
LABELS = {"http_request_method": "GET", "http_route": "/items/{item}"}
DURATION = "http_server_request_duration_seconds_count"


@pytest.fixture
def few_switches() -> Iterator[None]:
    """Let the interpreter switch threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def use(kind: Series, patch: pytest.MonkeyPatch) -> None:
    """Have responses counted by one kind of series, whose handles are those of a build with or without the GIL."""
    if kind is ResponseSeries and not handles.gil_enabled():
        pytest.skip("counting in one go needs the GIL")
    counter, gauge, histogram = handles.classes(kind is ResponseSeries)
    patch.setattr(writer_module, "_COUNTER", counter)
    patch.setattr(writer_module, "_GAUGE", gauge)
    patch.setattr(writer_module, "_HISTOGRAM", histogram)
    patch.setattr(request_series, "_RESPONSE_SERIES", kind)


def series_of(writer: Writer, method: str = "GET", status: int = 200) -> ResponseSeries:
    """Return the series of one method and status of a route."""
    return Table(writer, lambda: None).add_response(method, "/items/{item}", status, "")


def ledger_of(number: int) -> Ledger:
    """Return the ledger of a request unlike others: exact in binary, so that sums do not depend on their order."""
    ledger = Ledger("GET")
    ledger.longest_step = (number % 7) / 1024
    ledger.queries = number % 5
    ledger.seconds[ON_LOOP] = (number % 11) / 256
    if number % 3 == 0:
        ledger.waited = True
        ledger.seconds[DB], ledger.seconds[LOOP_BLOCKED] = number / 128, 0.25
    if number % 4 == 0:
        ledger.waited = True
        ledger.seconds[ACCEPT_QUEUE] = 0.125 * number
    if number % 2:
        ledger.seconds[OTHER] = 1 / 64
    return ledger


def counted(writer: Writer, count: int = 60) -> Samples:
    """Write requests of several kinds and return what the writer has then."""
    all_series = [
        series_of(writer),
        series_of(writer, status=404),
        series_of(writer, "POST"),
        series_of(writer, "HEAD"),
    ]
    for number in range(count):
        for series in all_series:
            series.write(ledger_of(number), number / 32, (number % 9) / 64, number * 100)
    return writer.samples()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", [True, False], ids=["files", "memory"])
def test_all_ways_to_write_a_request_count_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Series, files: bool
) -> None:
    """Sixty unlike requests of four label sets leave the numbers that handles by themselves leave, bucket by bucket."""
    use(kind, monkeypatch)
    writer = Writer.open(tmp_path / "written") if files else Writer.in_memory()
    found = counted(writer)
    monkeypatch.setattr(ResponseSeries, "write", ResponseSeries.write_apart)
    monkeypatch.setattr(LockedResponseSeries, "write", ResponseSeries.write_apart)
    other = Writer.open(tmp_path / "expected") if files else Writer.in_memory()
    assert found == counted(other)
    assert (
        found[DURATION, tuple(sorted({**LABELS, "http_response_status_code": "404", "error_type": ""}.items()))] == 60
    )
    writer.close()
    other.close()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_several_threads_all_count(
    monkeypatch: pytest.MonkeyPatch, few_switches: None, kind: Series
) -> None:
    """Four threads that write requests of one label set lose none, in any of its histograms and stages."""
    use(kind, monkeypatch)
    writer = Writer.in_memory()
    series = series_of(writer)
    run_threads(series, threads=4, each=5_000)
    expect_all(writer, 20_000)


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_while_series_are_moved(
    monkeypatch: pytest.MonkeyPatch, few_switches: None, kind: Series
) -> None:
    """While all series go from region to region, every request is counted once in each of them."""
    use(kind, monkeypatch)
    writer = Writer.in_memory()
    series = series_of(writer)
    series.write(ledger_of(1), 0.5, 0.25, 100)
    done, moved = threading.Event(), 0
    worker = threading.Thread(target=lambda: (run_threads(series, threads=2, each=10_000), done.set()))
    worker.start()
    while not done.is_set() or moved < 5:
        for stem in ("histogram", "counter"):
            with writer._lock:
                target = Region.anonymous(1 << 20)
                move(writer._files.regions[stem], target)
                writer._files.regions[stem] = target
        moved += 1
    worker.join()
    expect_all(writer, 20_001)
    series.write(ledger_of(1), 0.5, 0.25, 100)
    series.write(ledger_of(1), 0.5, 0.25, 100)
    expect_all(writer, 20_003)


def test_without_the_gil_a_request_waits_for_who_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a build without the GIL nothing of a request is written while another thread holds the handles' lock."""
    use(LockedResponseSeries, monkeypatch)
    writer = Writer.in_memory()
    series = series_of(writer)
    series.write(ledger_of(1), 0.5, 0.25, 100)
    with handles._lock:
        before = writer.samples()
        writing = threading.Thread(target=series.write, args=(ledger_of(1), 0.5, 0.25, 100))
        writing.start()
        writing.join(0.05)
        assert writing.is_alive()
        assert writer.samples() == before
    writing.join()
    expect_all(writer, 2)


@pytest.mark.skipif(not handles.gil_enabled(), reason="counting in one go needs the GIL")
def test_series_that_do_not_lie_together_are_counted_by_their_handles() -> None:
    """A histogram whose file was full lies in memory, apart from the others, and is counted there."""
    writer = Writer.in_memory()
    series = series_of(writer)
    apart = Region.anonymous(1 << 20)
    place = apart.place([b"x", b"y"])
    lone = series.route.latency
    lone.view, lone.index, lone.cells, lone.mark = apart.view, place[0], (place[1],) * len(lone.cells), 0
    for _ in range(3):
        series.write(ledger_of(1), 0.5, 0.25, 100)
    assert series._place is None
    assert [apart.view[index] for index in place] == [1.5, 3.0]
    labels = {**LABELS, "http_response_status_code": "200", "error_type": ""}
    assert writer.value(DURATION, **labels) == 3


def run_threads(series: ResponseSeries, *, threads: int, each: int) -> None:
    """Write requests in several threads at once."""

    def run() -> None:
        ledger = ledger_of(3)
        for _ in range(each):
            series.write(ledger, 0.5, 0.25, 100)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def expect_all(writer: Writer, count: int) -> None:
    """Check that each histogram, and the count of the worker, has so many requests."""
    samples = writer.samples()
    totals = {name: value for (name, _), value in samples.items() if name.endswith("_count")}
    assert len(totals) == 6
    assert set(totals.values()) == {count}
    assert samples["headroom_worker_requests_total", (("worker", "0"),)] == count
    whole = [value for (name, labels), value in samples.items() if ("le", "+Inf") in labels]
    assert whole == [count] * 6
